package coordstore

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"io"
	"os"

	bolt "go.etcd.io/bbolt"
)

// What bbolt's version 2 looks like, in the machine's byte order: pages, each with a 16-byte header
//
//	ID u64, flags u16, count u16, overflow u32 (pages that belong to it)
//
// and after it, in a branch or leaf page, count elements of 16 bytes; each one's key, and after it the value, is
// position bytes from the element's start:
//
//	branch: position u32, key size u32, page u64
//	leaf:   flags u32, position u32, key size u32, value size u32
//
// The value of a leaf's element with the bucket flag is root page u64, sequence u64; if the root is
// 0, the bucket's only page, a leaf, follows.
const (
	pageHeader  = 16
	elementSize = 16

	branchPage   = 0x01
	leafPage     = 0x02
	freelistPage = 0x10
	bucketFlag   = 0x01

	noFreelist = ^uint64(0)
)

var ne = binary.NativeEndian

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrForeign, fmt.Sprintf(format, args...))
}

// header is what the valid one of the two headers says.
type header struct {
	pageSize             int64
	root, freelist, size uint64 // page numbers; all pages are below size
}

// readHeader finds the header and makes sure that the file is as long as it says. The headers are the first two pages,
// each with a page header and
//
//	magic u32, version u32, page size u32, flags u32, root (u64, u64), freelist u64, pages u64, txid u64, FNV-1a 64 of all before
//
// The valid one with the higher txid counts.
func readHeader(f *os.File) (header, error) {
	var h header
	st, err := f.Stat()
	if err != nil {
		return h, err
	}
	var best uint64
	found := false
	read := func(off int64) (page int64) {
		var b [80]byte
		if _, err := f.ReadAt(b[:], off); err != nil && err != io.EOF {
			return 0
		}
		m := b[pageHeader:]
		if ne.Uint32(m) != 0xED0CDAED || ne.Uint32(m[4:]) != 2 {
			return 0
		}
		sum := fnv.New64a()
		sum.Write(m[:56])
		page = int64(ne.Uint32(m[8:]))
		if sum.Sum64() != ne.Uint64(m[56:]) || page < 1<<10 || page > 64<<10 || page&(page-1) != 0 {
			return 0
		}
		if txid := ne.Uint64(m[48:]); !found || txid > best {
			found, best = true, txid
			h = header{page, ne.Uint64(m[16:]), ne.Uint64(m[32:]), ne.Uint64(m[40:])}
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
		return h, ErrForeign
	case h.size > uint64(st.Size()/h.pageSize):
		return h, damaged("shorter than its header says")
	}
	return h, nil
}

// checkHeader makes sure that the file is bbolt's and not cut off, before it is mapped: reading
// past the end of a mapping is a signal, not an error.
func checkHeader(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = readHeader(f)
	return err
}

// checkPages checks all pages of the file, so that damage shows now rather than as a panic later. bbolt's own
// check follows what it finds on a page without a look at its bounds, in a goroutine of its own, where a fault cannot
// be caught. This one reads the file and never goes beyond a page. bbolt opens the file for its lock: for reading
// it does not look further than the headers.
func checkPages(path string) error {
	var f *os.File
	db, err := open(path, &bolt.Options{ReadOnly: true, OpenFile: func(name string, flag int, perm os.FileMode) (file *os.File, err error) {
		f, err = os.OpenFile(name, flag, perm)
		return f, err
	}})
	if err != nil {
		return err
	}
	defer db.Close()
	h, err := readHeader(f) // again: now nobody writes to it
	if err != nil {
		return err
	}
	c := &checker{f: f, header: h, seen: make([]pageUse, h.size)}
	return c.run()
}

type pageUse byte

const (
	unseen pageUse = iota
	used
	free
)

// checker walks through the pages of a file.
type checker struct {
	f *os.File
	header
	seen []pageUse
}

func (c *checker) run() error {
	if c.size < 2 {
		return damaged("no pages")
	}
	c.seen[0], c.seen[1] = used, used // the headers
	if c.freelist != noFreelist {
		if err := c.checkFreelist(); err != nil {
			return err
		}
	}
	if err := c.walk(c.root, nil, nil); err != nil {
		return err
	}
	for id, u := range c.seen {
		if u == unseen && c.freelist != noFreelist {
			return damaged("page %d is neither used nor free", id)
		}
	}
	return nil
}

// page reads a page with those that belong to it. No page may be met twice.
func (c *checker) page(id uint64) ([]byte, error) {
	if id >= c.size {
		return nil, damaged("page %d is beyond the end", id)
	}
	var head [pageHeader]byte
	if _, err := c.f.ReadAt(head[:], int64(id)*c.pageSize); err != nil {
		return nil, err
	}
	n := uint64(ne.Uint32(head[12:])) + 1
	switch {
	case ne.Uint64(head[:]) != id:
		return nil, damaged("page %d says that it is page %d", id, ne.Uint64(head[:]))
	case n > c.size-id:
		return nil, damaged("page %d goes beyond the end", id)
	}
	for i := id; i < id+n; i++ {
		if c.seen[i] != unseen {
			return nil, damaged("page %d is used twice, or free", i)
		}
		c.seen[i] = used
	}
	b := make([]byte, int64(n)*c.pageSize)
	_, err := c.f.ReadAt(b, int64(id)*c.pageSize)
	return b, err
}

func (c *checker) checkFreelist() error {
	b, err := c.page(c.freelist)
	if err != nil {
		return err
	}
	if ne.Uint16(b[8:]) != freelistPage {
		return damaged("page %d is not the list of free pages", c.freelist)
	}
	n, b := uint64(ne.Uint16(b[10:])), b[pageHeader:]
	if n == 0xffff { // more do not fit: the number comes first
		n, b = ne.Uint64(b), b[8:]
	}
	if n > uint64(len(b)/8) {
		return damaged("%d free pages", n)
	}
	for ; n > 0; n, b = n-1, b[8:] {
		id := ne.Uint64(b)
		if id >= c.size || c.seen[id] != unseen {
			return damaged("page %d cannot be free", id)
		}
		c.seen[id] = free
	}
	return nil
}

// walk checks the tree below a page. Its keys must be at least low, and below high unless that is nil.
func (c *checker) walk(id uint64, low, high []byte) error {
	b, err := c.page(id)
	if err != nil {
		return err
	}
	if ne.Uint16(b[8:]) != branchPage {
		return c.leaf(b, id, low, high)
	}
	n := int(ne.Uint16(b[10:]))
	if n == 0 || pageHeader+n*elementSize > len(b) {
		return damaged("page %d with %d elements", id, n)
	}
	key := func(i int) ([]byte, error) {
		e := b[pageHeader+i*elementSize:]
		return cut(e, id, ne.Uint32(e), ne.Uint32(e[4:]), 0)
	}
	k, err := key(0)
	if err != nil {
		return err
	}
	for i := range n {
		next := high
		if i+1 < n {
			if next, err = key(i + 1); err != nil {
				return err
			}
		}
		if !within(k, low, high) || i+1 < n && bytes.Compare(k, next) >= 0 {
			return damaged("the keys of page %d are out of order", id)
		}
		if err := c.walk(ne.Uint64(b[pageHeader+i*elementSize+8:]), k, next); err != nil {
			return err
		}
		k = next
	}
	return nil
}

// leaf checks a leaf page, and the buckets in it. An ID of 0 says that it is the page of a bucket without pages of its own.
func (c *checker) leaf(b []byte, id uint64, low, high []byte) error {
	n := int(ne.Uint16(b[10:]))
	if ne.Uint16(b[8:]) != leafPage || pageHeader+n*elementSize > len(b) {
		return damaged("page %d is of kind %#x, with %d elements", id, ne.Uint16(b[8:]), n)
	}
	var last []byte
	for i := range n {
		e := b[pageHeader+i*elementSize:]
		size := ne.Uint32(e[8:])
		kv, err := cut(e, id, ne.Uint32(e[4:]), size, ne.Uint32(e[12:]))
		if err != nil {
			return err
		}
		k, v := kv[:size], kv[size:]
		if !within(k, low, high) || bytes.Compare(k, last) <= 0 {
			return damaged("the keys of page %d are out of order", id)
		}
		last = k
		if ne.Uint32(e)&bucketFlag == 0 {
			continue
		}
		switch {
		case id == 0 || len(v) < 16:
			return damaged("a bucket in page %d is none", id)
		case ne.Uint64(v) != 0:
			err = c.walk(ne.Uint64(v), nil, nil)
		case len(v) < 16+pageHeader:
			return damaged("a bucket in page %d is none", id)
		default:
			err = c.leaf(v[16:], 0, nil, nil)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// cut returns the key and value at a position from element e on, to the end of whose page e reaches.
func cut(e []byte, id uint64, pos, ksize, vsize uint32) ([]byte, error) {
	end := uint64(pos) + uint64(ksize) + uint64(vsize)
	if ksize == 0 || end > uint64(len(e)) {
		return nil, damaged("page %d has an element that goes beyond it, or has no key", id)
	}
	return e[pos:end], nil
}

// within reports whether k is at least low and, unless that is nil, below high.
func within(k, low, high []byte) bool {
	return bytes.Compare(k, low) >= 0 && (high == nil || bytes.Compare(k, high) < 0)
}
