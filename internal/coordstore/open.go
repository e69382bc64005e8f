package coordstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

var (
	schemaKey = []byte("schema")
	formatKey = []byte("format")
)

// format marks a bbolt file as ours.
const format = "tailnode-coord"

func openDB(path string) (*bolt.DB, error) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if err := create(path); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%w: not a regular file", ErrForeign)
	default:
		if err := checkHeader(path); err != nil {
			return nil, err
		}
		if err := checkPages(path); err != nil {
			return nil, err
		}
	}
	db, err := open(path, &bolt.Options{FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	if err := verify(db); err != nil {
		db.Close()
		return nil, err
	}
	// A file that came with wider permissions (a restored copy) is narrowed: it holds a private key.
	if err := os.Chmod(path, 0o600); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

func open(path string, o *bolt.Options) (db *bolt.DB, err error) {
	defer guard(&err)()
	o.Timeout = time.Second
	db, err = bolt.Open(path, 0o600, o)
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, ErrInUse
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrVersionMismatch), errors.Is(err, berrors.ErrChecksum):
		return nil, fmt.Errorf("%w (%w)", ErrForeign, err)
	}
	return db, err
}

// create makes a whole new database beside path and moves it there, so that a process killed in
// between leaves no half-made file under the name.
func create(path string) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-")
	if err != nil {
		return err
	}
	name := tmp.Name()
	tmp.Close()
	defer os.Remove(name)
	db, err := bolt.Open(name, 0o600, nil) // an empty file becomes a database
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, n := range buckets {
			if _, err := tx.CreateBucketIfNotExists([]byte(n)); err != nil {
				return err
			}
		}
		m := tx.Bucket([]byte(Meta))
		if err := m.Put(formatKey, []byte(strconv.Quote(format))); err != nil {
			return err
		}
		return m.Put(schemaKey, []byte(strconv.Itoa(Schema)))
	})
	if cerr := db.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	// Link fails if another process was faster; its file is as good.
	if err := os.Link(name, path); err != nil && !errors.Is(err, os.ErrExist) {
		if err := os.Rename(name, path); err != nil { // a file system without links
			return err
		}
	}
	if d, err := os.Open(filepath.Dir(path)); err == nil {
		d.Sync() // best effort: not every system syncs folders
		d.Close()
	}
	return nil
}

// verify makes sure that the database is ours, of a version that is known, and whole.
func verify(db *bolt.DB) (err error) {
	defer guard(&err)()
	return db.View(func(tx *bolt.Tx) error {
		m := tx.Bucket([]byte(Meta))
		if m == nil || string(m.Get(formatKey)) != strconv.Quote(format) {
			return fmt.Errorf("%w: no format mark", ErrForeign)
		}
		v, err := strconv.Atoi(string(m.Get(schemaKey)))
		if err != nil {
			return fmt.Errorf("%w: no schema version", ErrForeign)
		}
		if v > Schema {
			return fmt.Errorf("%w (schema %d, this program knows %d)", ErrSchema, v, Schema)
		}
		for _, n := range buckets {
			if tx.Bucket([]byte(n)) == nil {
				return fmt.Errorf("%w: no %s", ErrForeign, n)
			}
		}
		return nil
	})
}

// guard turns a panic or a memory fault, which is how bbolt meets a damaged page, into an error.
func guard(err *error) func() {
	old := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			*err = fmt.Errorf("%w: %v", ErrForeign, r)
		}
	}
}
