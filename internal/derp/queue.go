package derp

import (
	"slices"
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
	at            int   // index in active, when bytes > 0
	first, last   place // its oldest and its newest frame
}

// place is where a frame is: a chunk, and the index in its refs. The zero value is nowhere.
type place struct {
	c *Chunk
	i int
}

type ref struct {
	off, n int
	flow   *Flow // nil: dropped
	next   place // the flow's next frame
}

// Chunk is a run of frames taken from a [Queue].
type Chunk struct {
	buf  []byte // length: what is used
	big  *bigBuf
	refs []ref
	head int // those of refs before it are dropped
	live int // frames that are not dropped; never 0 in a queue
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
	if len(q.chunks) > q.maxChunks() {
		q.compact()
	}
	c := q.enter(f, size)
	c.buf = AppendPacket(c.buf, t, k, packet)
	q.count(f, size, 1)
	return dropped
}

// Len returns how much is queued.
func (q *Queue) Len() (bytes, frames int) { return q.bytes, q.frames }

// Pop takes the oldest chunk out, or returns nil. The caller must Release it.
func (q *Queue) Pop() *Chunk {
	if len(q.chunks) == 0 {
		return nil
	}
	c := q.chunks[0]
	q.remove(c)
	w := 0
	for i := range c.refs {
		r := &c.refs[i]
		if r.flow == nil {
			continue
		}
		q.leave(r)
		if w != r.off {
			copy(c.buf[w:], c.buf[r.off:r.off+r.n])
		}
		w += r.n
	}
	c.buf = c.buf[:w]
	return c
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
	c.buf, c.refs, c.head, c.live = c.buf[:0], c.refs[:0], 0, 0
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

// enter notes that the next size bytes of the chunk it returns will be a frame of f, its newest.
func (q *Queue) enter(f *Flow, size int) *Chunk {
	c := q.tail(size)
	at := place{c, len(c.refs)}
	if f.first.c == nil {
		f.first = at
	} else {
		f.last.c.refs[f.last.i].next = at
	}
	f.last = at
	c.refs = append(c.refs, ref{off: len(c.buf), n: size, flow: f})
	c.live++
	return c
}

// leave takes the oldest frame of a flow out of the flow.
func (q *Queue) leave(r *ref) {
	f := r.flow
	if f.first = r.next; f.first.c == nil {
		f.last = place{}
	}
	q.count(f, -r.n, -1)
	r.flow, r.next = nil, place{}
}

func (q *Queue) remove(c *Chunk) {
	i := slices.Index(q.chunks, c) // nearly always 0
	if q.chunks = slices.Delete(q.chunks, i, i+1); len(q.chunks) == 0 && cap(q.chunks) > 4 {
		q.chunks = nil
	}
}

// maxChunks is how many chunks there may be. Two neighbours hold more than chunkTarget when
// they are filled, so that twice MaxBytes of them suffices for what is not dropped; half as
// much again is why compact, which copies at most MaxBytes, is called only once in as much.
func (q *Queue) maxChunks() int { return 3*q.MaxBytes/chunkTarget + 4 }

// compact moves the frames together: a few that stay keep the chunks whose others were dropped.
func (q *Queue) compact() {
	old := q.chunks
	q.chunks = nil
	for _, f := range q.active {
		f.first, f.last = place{}, place{}
	}
	for _, c := range old {
		for _, r := range c.refs {
			if r.flow != nil {
				to := q.enter(r.flow, r.n)
				to.buf = append(to.buf, c.buf[r.off:r.off+r.n]...)
			}
		}
		c.Release()
	}
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

// drop removes the oldest frame of flow f, or with nil the oldest of all. A chunk of which nothing
// is left goes with it, wherever it stands: memory would follow what was dropped otherwise.
func (q *Queue) drop(f *Flow) {
	if f == nil {
		c := q.chunks[0]
		for c.refs[c.head].flow == nil {
			c.head++
		}
		f = c.refs[c.head].flow
	}
	c := f.first.c
	q.leave(&c.refs[f.first.i])
	if c.live--; c.live == 0 {
		q.remove(c)
		c.Release()
	}
}
