package state

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// lockOffset lies behind everything the file holds, because Windows keeps
// others from reading locked bytes, and they shall read the process ID.
const lockOffset = 1 << 30

// tryLock takes the lock that belongs to this open file. The system drops it
// when the file is closed or the process ends.
func tryLock(f *os.File) (bool, error) {
	ol := windows.Overlapped{Offset: lockOffset}
	err := windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &ol)
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) || errors.Is(err, windows.ERROR_IO_PENDING) {
		return false, nil
	}
	return err == nil, err
}

// syncDir does nothing: Windows has no such call, and NTFS journals renames.
func syncDir(string) error { return nil }
