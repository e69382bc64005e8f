package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
)

// The files in the directory of a File.
const (
	FileName = "tailnode.state"
	lockName = "tailnode.lock"
	tempName = FileName + ".tmp"
)

const (
	formatName = "tailnode-state"
	version    = 1
	maxSize    = 16 << 20 // of the file; the values of a node are a few KB
)

// contents is the file: JSON, so that an administrator can tell what it is.
type contents struct {
	Format  string            `json:"format"`
	Version int               `json:"version"`
	Values  map[string][]byte `json:"values"` // base64
}

// File is a Store in a directory of its own: the state file and a lock file.
//
// Every write replaces the file by a new one that was synced to disk before,
// so a crash at any moment leaves either the old values or the new ones.
type File struct {
	dir  string
	lock *os.File

	mu     sync.Mutex
	values map[string][]byte
	closed bool
}

// OpenFile opens the store in dir, which it creates with mode 0700 if needed.
// An existing directory's mode is left alone; a state file that others may
// read is made 0600. It does not wait: if another store has dir open, in this process or
// another one, the error is ErrLocked. A file that is damaged or not ours is
// ErrCorrupt, one of a later version ErrVersion, and neither is touched. The caller must
// Close the store.
func OpenFile(dir string) (*File, error) {
	if dir == "" {
		return nil, errors.New("state: no directory given")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	lock, err := openLock(dir)
	if err != nil {
		return nil, err
	}
	f := &File{dir: dir, lock: lock}
	if f.values, err = load(filepath.Join(dir, FileName)); err != nil {
		lock.Close()
		return nil, err
	}
	// Left by a process that ended in the middle of a write. Nothing
	// refers to it.
	os.Remove(filepath.Join(dir, tempName))
	return f, nil
}

func openLock(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockName)
	lock, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	ok, err := tryLock(lock)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("state: locking %s: %w", path, err)
	}
	if !ok {
		defer lock.Close()
		return nil, fmt.Errorf("%w: %s is open in %s", ErrLocked, dir, holder(lock))
	}
	// Who holds it, for the error above. Nothing depends on it.
	if lock.Truncate(0) == nil {
		lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return lock, nil
}

func holder(lock *os.File) string {
	b, _ := io.ReadAll(io.LimitReader(lock, 32))
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	switch {
	case err != nil:
		return "another process"
	case pid == os.Getpid():
		return "this process already"
	}
	return "process " + strconv.Itoa(pid)
}

func load(path string) (map[string][]byte, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string][]byte{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%w: %s is a %s", ErrCorrupt, path, kind(info.Mode()))
	case info.Size() > maxSize:
		return nil, fmt.Errorf("%w: %s is %d bytes long", ErrCorrupt, path, info.Size())
	}
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
		if err := os.Chmod(path, 0o600); err != nil {
			return nil, fmt.Errorf("state: %s can be read by other users, and that cannot be changed: %w", path, err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	var c contents
	dec := json.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(&c); err != nil {
		// The decoder's own words may quote the file: only the place is told.
		return nil, fmt.Errorf("%w: %s is not readable around byte %d of %d; move it away to start anew as a new node", ErrCorrupt, path, dec.InputOffset(), len(b))
	}
	if c.Format != formatName || c.Version < 1 {
		return nil, fmt.Errorf("%w: %s was not written by tailnode", ErrCorrupt, path)
	}
	if c.Version > version {
		return nil, fmt.Errorf("%w: %s is version %d, this program knows %d", ErrVersion, path, c.Version, version)
	}
	if rest := bytes.TrimSpace(b[dec.InputOffset():]); len(rest) > 0 {
		return nil, fmt.Errorf("%w: %s goes on after its end", ErrCorrupt, path)
	}
	if c.Values == nil {
		c.Values = map[string][]byte{}
	}
	return c.Values, nil
}

func kind(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "directory"
	case m&fs.ModeSymlink != 0:
		return "symbolic link"
	}
	return "special file"
}

// Dir returns the directory of the store.
func (f *File) Dir() string { return f.dir }

// ReadState implements Store, from memory.
func (f *File) ReadState(id string) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, ErrClosed
	}
	return read(f.values, id)
}

// WriteState implements Store. It blocks until the disk has the value. After an
// error the store holds what it held before. Writing the value that is there
// already touches no disk.
func (f *File) WriteState(id string, value []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	old, had := f.values[id]
	if had == (value != nil) && bytes.Equal(old, value) {
		return nil
	}
	write(f.values, id, value)
	if err := f.save(); err != nil {
		if had {
			f.values[id] = old
		} else {
			delete(f.values, id)
		}
		return fmt.Errorf("state: writing %q: %w", id, err)
	}
	return nil
}

func (f *File) save() error {
	b, err := json.MarshalIndent(contents{formatName, version, f.values}, "", "  ")
	if err != nil {
		return errors.New("not encodable")
	}
	if len(b) >= maxSize {
		return fmt.Errorf("the state file would be %d bytes long, more than %d", len(b), maxSize)
	}
	temp := filepath.Join(f.dir, tempName)
	os.Remove(temp) // so that O_EXCL never follows somebody's link
	if err := writeSynced(temp, append(b, '\n')); err != nil {
		os.Remove(temp)
		return err
	}
	if err := os.Rename(temp, filepath.Join(f.dir, FileName)); err != nil {
		os.Remove(temp)
		return err
	}
	return syncDir(f.dir)
}

func writeSynced(path string, b []byte) error {
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	if err == nil {
		err = w.Sync()
	}
	return errors.Join(err, w.Close())
}

// Close releases the directory. It waits for a write in progress and may be
// called more than once. The store's methods give ErrClosed afterwards.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	clear(f.values)
	if err := f.lock.Close(); err != nil { // the lock goes with it
		return fmt.Errorf("state: %w", err)
	}
	return nil
}
