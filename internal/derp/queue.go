package derp

import (
	"sync"

	"github.com/tailnode/tailnode/internal/key"
)

// Queue holds encoded packet frames that wait for a connection's writer, in the order they
// came and contiguous in chunks that go out in one write each. It is bounded; when it is
// full the oldest frame of the flow that holds most of it goes, so that one busy flow loses
// its own packets and not those of others. Memory follows the backlog: none when empty.
//
// The zero value with MaxBytes and MaxFrames set is ready. It is not safe for concurrent
// use: the owner's lock guards it and its flows.
type Queue struct {
	MaxBytes, MaxFrames int

	chunks        []*Chunk
	bytes, frames int
	active        []*Flow
}

// Flow is one sender's share of a [Queue]. The zero value is an empty share. A Flow belongs
// to one queue.
type Flow struct {
	bytes, frames int
	at            int // index in active, when bytes > 0
}

type ref struct {
	off, n int
	flow   *Flow // nil: dropped
}

// Chunk is a run of frames taken from a [Queue].
type Chunk struct {
	buf  []byte // length: what is used
	big  *bigBuf
	refs []ref
	live int // frames, once popped
}

// A chunk is cut at chunkTarget, four full TLS records, unless one frame alone is longer.
// The first chunk of an empty queue is small: most connections never hold more.
const (
	chunkTarget = 64 << 10
	smallLen    = 4 << 10
)

var (
	bigChunks   = sync.Pool{New: func() any { b := new(bigBuf); return &Chunk{big: b, buf: b[:0]} }}
	smallChunks = sync.Pool{New: func() any { return &Chunk{buf: make([]byte, 0, smallLen)} }}
)

// Push appends a packet frame of type t with the key k. It returns how many older frames
// were dropped to make room. The packet is copied; it must not be longer than [MaxPacket].
func (q *Queue) Push(t FrameType, k key.NodePublic, packet []byte, f *Flow) (dropped int) {
	size := HeaderLen + key.Size + len(packet)
	for q.frames > 0 && (q.bytes+size > q.MaxBytes || q.frames >= q.MaxFrames) {
		q.drop(q.heaviest(f))
		dropped++
	}
	c := q.tail(size)
	off := len(c.buf)
	c.buf = AppendPacket(c.buf, t, k, packet)
	c.refs = append(c.refs, ref{off, size, f})
	q.count(f, size, 1)
	return dropped
}

// Len returns how much is queued.
func (q *Queue) Len() (bytes, frames int) { return q.bytes, q.frames }

// Pop takes the oldest chunk out, or returns nil. The caller must Release it.
func (q *Queue) Pop() *Chunk {
	for len(q.chunks) > 0 {
		c := q.shift()
		w := 0
		for _, r := range c.refs {
			if r.flow == nil {
				continue
			}
			q.count(r.flow, -r.n, -1)
			if w != r.off {
				copy(c.buf[w:], c.buf[r.off:r.off+r.n])
			}
			w += r.n
			c.live++
		}
		if c.buf = c.buf[:w]; w > 0 {
			return c
		}
		c.Release()
	}
	return nil
}

// Trim sets new bounds and drops what no longer fits; it returns how many frames went.
func (q *Queue) Trim(maxBytes, maxFrames int) (dropped int) {
	q.MaxBytes, q.MaxFrames = maxBytes, maxFrames
	for q.frames > 0 && (q.bytes > maxBytes || q.frames > maxFrames) {
		q.drop(nil)
		dropped++
	}
	return dropped
}

// Clear empties the queue; it returns how many frames went.
func (q *Queue) Clear() (dropped int) {
	dropped = q.frames
	for c := q.Pop(); c != nil; c = q.Pop() {
		c.Release()
	}
	return dropped
}

// Bytes returns the chunk's frames. They are valid until Release.
func (c *Chunk) Bytes() []byte { return c.buf }

// Frames returns how many frames those are.
func (c *Chunk) Frames() int { return c.live }

// Release gives the chunk's memory back.
func (c *Chunk) Release() {
	clear(c.refs)
	c.buf, c.refs, c.live = c.buf[:0], c.refs[:0], 0
	if c.big != nil {
		bigChunks.Put(c)
	} else {
		smallChunks.Put(c)
	}
}

func (q *Queue) tail(size int) *Chunk {
	if n := len(q.chunks); n > 0 {
		if c := q.chunks[n-1]; len(c.buf)+size <= min(cap(c.buf), chunkTarget) {
			return c
		}
	}
	var c *Chunk
	if len(q.chunks) == 0 && size <= smallLen {
		c = smallChunks.Get().(*Chunk)
	} else {
		c = bigChunks.Get().(*Chunk)
	}
	q.chunks = append(q.chunks, c)
	return c
}

func (q *Queue) shift() *Chunk {
	c := q.chunks[0]
	copy(q.chunks, q.chunks[1:]) // a handful at most
	q.chunks[len(q.chunks)-1] = nil
	if q.chunks = q.chunks[:len(q.chunks)-1]; len(q.chunks) == 0 && cap(q.chunks) > 4 {
		q.chunks = nil
	}
	return c
}

func (q *Queue) count(f *Flow, bytes, frames int) {
	was := f.bytes > 0
	f.bytes, f.frames = f.bytes+bytes, f.frames+frames
	q.bytes, q.frames = q.bytes+bytes, q.frames+frames
	switch is := f.bytes > 0; {
	case is && !was:
		f.at = len(q.active)
		q.active = append(q.active, f)
	case was && !is:
		last := len(q.active) - 1
		moved := q.active[last]
		q.active[f.at], moved.at = moved, f.at
		q.active[last] = nil
		q.active = q.active[:last]
	}
}

// heaviest returns the flow that holds most of the queue, f if it is as heavy as any.
func (q *Queue) heaviest(f *Flow) *Flow {
	best := f
	for _, g := range q.active {
		if g.bytes > best.bytes {
			best = g
		}
	}
	if best.frames == 0 {
		return nil
	}
	return best
}

// drop removes the oldest frame of flow f, or with nil the oldest of all.
func (q *Queue) drop(f *Flow) {
	for _, c := range q.chunks {
		for i := range c.refs {
			if r := &c.refs[i]; r.flow != nil && (f == nil || r.flow == f) {
				q.count(r.flow, -r.n, -1)
				r.flow = nil
				q.trimHead()
				return
			}
		}
	}
}

// trimHead frees the chunks at the head of which nothing is left. The tail chunk too:
// otherwise a queue that drops as fast as it is filled would keep dead frames.
func (q *Queue) trimHead() {
	for len(q.chunks) > 0 {
		c := q.chunks[0]
		for _, r := range c.refs {
			if r.flow != nil {
				return
			}
		}
		q.shift().Release()
	}
}
