package coordstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
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
		if err := checkHeader(path, st.Size()); err != nil {
			return nil, err
		}
	}
	db, err := open(path)
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

func open(path string) (db *bolt.DB, err error) {
	defer guard(&err)()
	db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType})
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

// checkHeader makes sure that the file is bbolt's and as long as its header says, before it is mapped:
// reading past the end of a mapping is a signal, not an error. The layout is bbolt's, version 2:
// two pages, each with a 16-byte page header and
//
//	magic u32, version u32, page size u32, flags u32, root (u64, u64), freelist u64, pages u64, txid u64, FNV-1a 64 of all before
//
// in the machine's byte order. The valid one with the higher txid counts.
func checkHeader(path string, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var pages, best uint64
	var pageSize int64
	found := false
	read := func(off int64) (page int64) {
		var b [80]byte
		if _, err := f.ReadAt(b[:], off); err != nil && err != io.EOF {
			return 0
		}
		m := b[16:]
		ne := binary.NativeEndian
		if ne.Uint32(m) != 0xED0CDAED || ne.Uint32(m[4:]) != 2 {
			return 0
		}
		h := fnv.New64a()
		h.Write(m[:56])
		if h.Sum64() != ne.Uint64(m[56:]) {
			return 0
		}
		page = int64(ne.Uint32(m[8:]))
		if txid := ne.Uint64(m[48:]); !found || txid > best {
			found, best, pages, pageSize = true, txid, ne.Uint64(m[40:]), page
		}
		return page
	}
	if page := read(0); page > 0 {
		read(page)
	} else { // the first header is torn: try where the second may be
		for p := int64(1 << 10); p <= 64<<10; p <<= 1 {
			if read(p) == p {
				break
			}
		}
	}
	switch {
	case !found:
		return ErrForeign
	case pages > uint64(size/pageSize):
		return fmt.Errorf("%w: shorter than its header says", ErrForeign)
	}
	return nil
}

// verify checks the whole tree, so that damage shows now rather than as a panic later.
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
			b := tx.Bucket([]byte(n))
			if b == nil {
				return fmt.Errorf("%w: no %s", ErrForeign, n)
			}
			if err := b.ForEach(func(_, _ []byte) error { return nil }); err != nil {
				return err
			}
		}
		var first error
		for err := range tx.Check() { // to the end: it runs in a goroutine of its own
			if first == nil {
				first = fmt.Errorf("%w: %w", ErrForeign, err)
			}
		}
		return first
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
