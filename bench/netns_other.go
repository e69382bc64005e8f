//go:build !linux

package main

func isolate(string) (bool, error) { return false, nil }

func namespaced() bool { return false }
