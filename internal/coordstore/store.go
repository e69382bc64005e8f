// Package coordstore keeps what a coordination server must not forget: its keys, users, nodes, auth keys
// and settings, in one bbolt file or in memory.
//
// The server holds all of it in memory as well and writes through. Writes are staged without blocking
// and committed in groups by one goroutine, so that a thousand registrations at once cost a few fsyncs;
// [Ticket.Wait] returns when the group is on disk, and only then may the server acknowledge. A group
// is atomic, and a batch staged by one call is never split between groups.
package coordstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Schema is the version of the file's layout. A file with a later one is refused.
const Schema = 1

// Errors that Open and the tickets give, wrapped.
var (
	// ErrForeign reports a file that is not a coordination server's database, or is damaged. It was not changed.
	ErrForeign = errors.New("not a coordination server's database, or damaged; it was left as it is")
	// ErrInUse reports that another process has the file open.
	ErrInUse = errors.New("database is in use by another process")
	// ErrSchema reports a database written by a later version of this program.
	ErrSchema = errors.New("database was written by a later version")
	// ErrClosed reports a store that was closed.
	ErrClosed = errors.New("store is closed")
)

// Bucket is one kind of record.
type Bucket string

// The buckets. Meta holds the single values.
const (
	Meta     Bucket = "meta"
	Users    Bucket = "users"
	Nodes    Bucket = "nodes"    // identity: changes seldom, committed before it is acknowledged
	Live     Bucket = "live"     // what a node last reported: written lazily, by node
	AuthKeys Bucket = "authkeys" // by key ID; the secret only as its hash
)

var buckets = []Bucket{Meta, Users, Nodes, Live, AuthKeys}

// Change is one record to write, or to delete if Value is nil.
type Change struct {
	Bucket Bucket
	Key    string
	Value  any // encoded as JSON
}

// Put and Del make changes.
func Put(b Bucket, key string, v any) Change { return Change{b, key, v} }

// Del makes the change that deletes a record.
func Del(b Bucket, key string) Change { return Change{b, key, nil} }

// Ticket stands for a staged batch.
type Ticket struct{ g *group }

// Wait blocks until the batch is durable or the store has failed. It cannot be cancelled: a commit is
// an fsync away.
func (t Ticket) Wait() error {
	if t.g == nil {
		return nil
	}
	<-t.g.done
	return t.g.err
}

type recKey struct {
	b Bucket
	k string
}

// group is a set of writes that are committed together.
type group struct {
	recs   map[recKey][]byte // nil value: delete
	urgent bool
	done   chan struct{}
	err    error
}

// LazyDelay is how long a lazy write may wait for company.
const LazyDelay = 2 * time.Second

// Store is the database. Its methods are safe for concurrent use.
type Store struct {
	db *bolt.DB // nil: in memory

	mu     sync.Mutex
	next   *group // being filled
	cur    *group // being committed
	err    error  // a commit failed: nothing more is accepted
	closed bool
	kick   chan struct{} // capacity 1: next became urgent
	quit   chan struct{}
	wg     sync.WaitGroup
}

// NewMemory returns a store that forgets.
func NewMemory() *Store { return &Store{} }

// Open opens the database at path or creates it (mode 0600). The file is locked until Close.
// A file that is not a sound database is an error and stays untouched.
func Open(path string) (*Store, error) {
	db, err := openDB(path)
	if err != nil {
		return nil, fmt.Errorf("coordstore: %s: %w", path, err)
	}
	s := &Store{db: db, kick: make(chan struct{}, 1), quit: make(chan struct{})}
	s.wg.Go(s.run)
	return s, nil
}

// Load calls f for every record of b, in key order. The bytes are f's to keep.
func (s *Store) Load(b Bucket, f func(key string, value []byte) error) error {
	if s.db == nil {
		return nil
	}
	return s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte(b)).ForEach(func(k, v []byte) error {
			if err := f(string(k), append([]byte(nil), v...)); err != nil {
				return fmt.Errorf("coordstore: record %s/%s: %w", b, k, err)
			}
			return nil
		})
	})
}

// Stage adds changes that must be durable before they are acknowledged: wait for the ticket.
// A later change of the same record replaces one that is not yet committed. Without changes the
// ticket stands for all that was staged so before.
func (s *Store) Stage(changes ...Change) Ticket { return s.stage(true, changes) }

// StageLazy adds changes that may be lost if the process dies within [LazyDelay].
func (s *Store) StageLazy(changes ...Change) { s.stage(false, changes) }

func (s *Store) stage(urgent bool, changes []Change) Ticket {
	if s.db == nil {
		return Ticket{}
	}
	recs := make(map[recKey][]byte, len(changes))
	for _, c := range changes {
		var v []byte
		if c.Value != nil {
			var err error
			if v, err = json.Marshal(c.Value); err != nil {
				return failed(fmt.Errorf("coordstore: encode %s/%s: %w", c.Bucket, c.Key, err))
			}
		}
		recs[recKey{c.Bucket, c.Key}] = v
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.err != nil:
		return failed(s.err)
	case s.closed:
		return failed(fmt.Errorf("coordstore: %w", ErrClosed))
	}
	if len(changes) == 0 {
		if s.next != nil && s.next.urgent {
			return Ticket{s.next}
		}
		return Ticket{s.cur}
	}
	g := s.next
	if g == nil {
		g = &group{recs: recs, done: make(chan struct{})}
		s.next = g
	} else {
		maps.Copy(g.recs, recs)
	}
	if urgent && !g.urgent {
		g.urgent = true
		select {
		case s.kick <- struct{}{}:
		default:
		}
	}
	return Ticket{g}
}

func failed(err error) Ticket {
	g := &group{done: make(chan struct{}), err: err}
	close(g.done)
	return Ticket{g}
}

// run commits groups: at once when one is urgent, else every LazyDelay.
func (s *Store) run() {
	t := time.NewTicker(LazyDelay)
	defer t.Stop()
	for {
		select {
		case <-s.kick:
			s.commit()
		case <-t.C:
			s.commit()
		case <-s.quit:
			s.commit()
			return
		}
	}
}

func (s *Store) commit() {
	s.mu.Lock()
	g := s.next
	s.next, s.cur = nil, g
	err := s.err
	s.mu.Unlock()
	if g == nil {
		return
	}
	if err == nil {
		err = s.db.Update(func(tx *bolt.Tx) error {
			for k, v := range g.recs {
				b := tx.Bucket([]byte(k.b))
				var err error
				if v == nil {
					err = b.Delete([]byte(k.k))
				} else {
					err = b.Put([]byte(k.k), v)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			err = fmt.Errorf("coordstore: commit: %w", err)
		}
	}
	s.mu.Lock()
	s.cur = nil
	// After an error what the server holds in memory is ahead of the disk. Nothing may be
	// acknowledged from here on.
	s.err = err
	s.mu.Unlock()
	g.err = err
	close(g.done)
}

// Err returns the error that stopped the store, or nil.
func (s *Store) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close commits what is staged and closes the file. It may be called more than once.
func (s *Store) Close() error {
	s.mu.Lock()
	was := s.closed
	s.closed = true
	s.mu.Unlock()
	if was || s.db == nil {
		return nil
	}
	close(s.quit)
	s.wg.Wait()
	err := s.Err()
	if cerr := s.db.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("coordstore: close: %w", cerr)
	}
	return err
}
