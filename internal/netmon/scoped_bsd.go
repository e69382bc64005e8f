//go:build dragonfly || freebsd || netbsd || openbsd

package netmon

const scoped = 0
