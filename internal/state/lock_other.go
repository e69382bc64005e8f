//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd || windows)

package state

import (
	"errors"
	"os"
)

// tryLock refuses: without a lock that ends with its process, two nodes could
// become one.
func tryLock(f *os.File) (bool, error) {
	return false, errors.New("this system has no file locks; use a store of your own")
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
