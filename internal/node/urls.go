package node

import (
	"sync"
	"time"
)

const (
	// maxURLs is how many URLs wait to be shown; the oldest, which is no good any more, makes room.
	maxURLs = 8
	// showWait is how long Close waits for what shows a URL, which may itself be waiting for Close.
	showWait = time.Second
)

// urls shows URLs to the user in their order, on a goroutine of their own, which is there while there is something to show: it
// may call Close, which waits for the session's goroutine.
type urls struct {
	show func(url string)

	mu     sync.Mutex
	queue  []string
	shown  chan struct{} // closed when the goroutine ends; nil: there is none
	closed bool
}

// add does not block.
func (u *urls) add(url string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.show == nil || u.closed {
		return
	}
	if u.queue = append(u.queue, url); len(u.queue) > maxURLs {
		u.queue = u.queue[1:]
	}
	if u.shown == nil {
		u.shown = make(chan struct{})
		go u.run(u.shown)
	}
}

func (u *urls) run(shown chan struct{}) {
	defer close(shown)
	for {
		u.mu.Lock()
		if len(u.queue) == 0 || u.closed {
			u.queue, u.shown = nil, nil
			u.mu.Unlock()
			return
		}
		url := u.queue[0]
		u.queue = u.queue[1:]
		u.mu.Unlock()
		u.show(url)
	}
}

// close has no more shown. It waits for what is being shown, but not for ever: that may be what called Close.
func (u *urls) close() {
	u.mu.Lock()
	u.closed = true
	shown := u.shown
	u.mu.Unlock()
	if shown == nil {
		return
	}
	t := time.NewTimer(showWait)
	defer t.Stop()
	select {
	case <-shown:
	case <-t.C:
	}
}
