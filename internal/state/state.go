// Package state keeps what a node must remember to come back as itself: its keys
// and its profile, under short names. Values are secrets; no error and no
// log of this package holds one.
package state

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"
)

// Store keeps values by name. Implementations are safe for concurrent use.
type Store interface {
	// ReadState returns the value of id, which is the caller's own copy, or
	// an error that is ErrNotExist.
	ReadState(id string) ([]byte, error)
	// WriteState sets the value of id and keeps no reference to it. When it
	// returns nil, the value outlives the process if the store does. A nil
	// value removes id.
	WriteState(id string, value []byte) error
}

var (
	// ErrNotExist reports that a store holds no value of that name. It is
	// also fs.ErrNotExist.
	ErrNotExist error = notExist{}
	// ErrLocked reports a directory that another store has open, in this
	// process or another one.
	ErrLocked = errors.New("state: directory is in use")
	// ErrCorrupt reports a state file that is damaged or not one of ours. It
	// is never overwritten.
	ErrCorrupt = errors.New("state: not a valid state file")
	// ErrVersion reports a state file of a later version of this package. It
	// is never overwritten.
	ErrVersion = errors.New("state: file is of a later version")
	// ErrClosed reports the use of a closed store.
	ErrClosed = errors.New("state: store is closed")
)

type notExist struct{}

func (notExist) Error() string        { return "state: no such value" }
func (notExist) Is(target error) bool { return target == fs.ErrNotExist }

// Memory is a Store that forgets everything when the process ends.
type Memory struct {
	mu sync.Mutex
	m  map[string][]byte
}

// NewMemory returns an empty Memory.
func NewMemory() *Memory { return &Memory{m: map[string][]byte{}} }

// ReadState implements Store. It does not block.
func (s *Memory) ReadState(id string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return read(s.m, id)
}

// WriteState implements Store. It does not block.
func (s *Memory) WriteState(id string, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	write(s.m, id, value)
	return nil
}

func read(m map[string][]byte, id string) ([]byte, error) {
	v, ok := m[id]
	if !ok {
		return nil, fmt.Errorf("%w: %q", ErrNotExist, id)
	}
	return append([]byte{}, v...), nil
}

func write(m map[string][]byte, id string, value []byte) {
	if value == nil {
		delete(m, id)
		return
	}
	m[id] = append([]byte{}, value...)
}

// Adapt makes a Store of two functions of the user's. A missing value may be
// told by any error that is fs.ErrNotExist, or by an empty value. Calls do not overlap, and
// what the functions get and give may be kept by either side.
func Adapt(read func(id string) ([]byte, error), write func(id string, value []byte) error) Store {
	return &adapted{read: read, write: write}
}

type adapted struct {
	mu    sync.Mutex
	read  func(string) ([]byte, error)
	write func(string, []byte) error
}

func (s *adapted) ReadState(id string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.read(id)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && len(v) == 0:
		return nil, fmt.Errorf("%w: %q", ErrNotExist, id)
	case err != nil:
		return nil, fmt.Errorf("state: reading %q: %w", id, err)
	}
	return append([]byte{}, v...), nil
}

func (s *adapted) WriteState(id string, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if value != nil {
		value = append([]byte{}, value...)
	}
	if err := s.write(id, value); err != nil {
		return fmt.Errorf("state: writing %q: %w", id, err)
	}
	return nil
}
