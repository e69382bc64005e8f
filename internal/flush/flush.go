// Package flush is the goroutine that sends what others have gathered, as soon as it gets to run.
package flush

import "sync"

// A Flusher calls Flush for each T that was added, in order, on one goroutine, which starts with the first. Its methods
// are safe for concurrent use.
type Flusher[T any] struct {
	Flush func(T) // set before the first Add

	mu      sync.Mutex
	cond    sync.Cond
	list    []T
	started bool
	closed  bool
	wg      sync.WaitGroup
}

// Add queues x, or reports that it is too late. It does not block.
func (f *Flusher[T]) Add(x T) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return false
	}
	if !f.started {
		f.started = true
		f.cond.L = &f.mu
		f.wg.Go(f.run)
	}
	f.list = append(f.list, x)
	f.cond.Signal()
	return true
}

func (f *Flusher[T]) run() {
	var list []T
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		for len(f.list) == 0 {
			if f.closed {
				return
			}
			f.cond.Wait()
		}
		list, f.list = f.list, list[:0]
		f.mu.Unlock()
		for _, x := range list {
			f.Flush(x)
		}
		clear(list)
		f.mu.Lock()
	}
}

// Close ends the goroutine, with nothing left to flush, and waits for it.
func (f *Flusher[T]) Close() {
	f.mu.Lock()
	f.closed = true
	if f.started {
		f.cond.Signal()
	}
	f.mu.Unlock()
	f.wg.Wait()
}
