package netmap

import (
	"math/bits"
	"slices"
	"sort"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// index finds nodes by a hash. It is a persistent hash trie: a change copies the
// way from the root to the leaf and shares the rest, so a snapshot stays what
// it is and a delta costs no more with 10,000 peers than with ten. Several
// nodes may stand under one hash; who asks compares the key itself.
type index struct{ root *trie }

type trie struct {
	owner  *edit  // the change that made this node and may still write to it
	bitmap uint32 // which of the 32 places are taken; unused below the last level
	kids   []kid
}

// kid is a leaf or, if sub is not nil, a subtree.
type kid struct {
	hash uint64
	node *Node
	sub  *trie
}

// edit is the identity of one change. It must not be empty, or all would have
// the same address.
type edit struct{ _ byte }

const levelBits = 5

func (x *index) insert(e *edit, h uint64, n *Node) { x.root = x.root.insert(e, h, n, 0) }
func (x *index) remove(e *edit, h uint64, n *Node) { x.root = x.root.remove(e, h, n, 0) }

// replace puts n in the place of old under h.
func (x *index) replace(e *edit, h uint64, old, n *Node) { x.root = x.root.replace(e, h, old, n, 0) }

// find returns the node of the lowest ID for which match is true among those
// under h. A key that two nodes claim so belongs to the one that control allocated first.
func (x index) find(h uint64, match func(*Node) bool) (best *Node) {
	t, shift := x.root, 0
	for t != nil {
		kids := t.kids
		if shift < 64 {
			bit := uint32(1) << (h >> shift & 31)
			if t.bitmap&bit == 0 {
				return nil
			}
			k := &t.kids[bits.OnesCount32(t.bitmap&(bit-1))]
			if k.sub != nil {
				t, shift = k.sub, shift+levelBits
				continue
			}
			if k.hash == h && match(k.node) {
				return k.node
			}
			return nil
		}
		for i := range kids {
			if match(kids[i].node) && (best == nil || kids[i].node.ID < best.ID) {
				best = kids[i].node
			}
		}
		return best
	}
	return nil
}

func (t *trie) own(e *edit) *trie {
	if t == nil {
		return &trie{owner: e}
	}
	if t.owner == e {
		return t
	}
	return &trie{e, t.bitmap, slices.Clone(t.kids)}
}

func (t *trie) insert(e *edit, h uint64, n *Node, shift int) *trie {
	t = t.own(e)
	if shift >= 64 {
		t.kids = append(t.kids, kid{hash: h, node: n})
		return t
	}
	bit := uint32(1) << (h >> shift & 31)
	at := bits.OnesCount32(t.bitmap & (bit - 1))
	if t.bitmap&bit == 0 {
		t.bitmap |= bit
		t.kids = slices.Insert(t.kids, at, kid{hash: h, node: n})
		return t
	}
	k := &t.kids[at]
	sub := k.sub
	if sub == nil {
		sub = sub.insert(e, k.hash, k.node, shift+levelBits)
	}
	*k = kid{sub: sub.insert(e, h, n, shift+levelBits)}
	return t
}

func (t *trie) replace(e *edit, h uint64, old, n *Node, shift int) *trie {
	t = t.own(e)
	if shift >= 64 {
		if i := slices.IndexFunc(t.kids, func(k kid) bool { return k.node == old }); i >= 0 {
			t.kids[i].node = n
		}
		return t
	}
	bit := uint32(1) << (h >> shift & 31)
	if t.bitmap&bit == 0 {
		return t
	}
	k := &t.kids[bits.OnesCount32(t.bitmap&(bit-1))]
	if k.sub != nil {
		k.sub = k.sub.replace(e, h, old, n, shift+levelBits)
	} else if k.node == old {
		k.node = n
	}
	return t
}

func (t *trie) remove(e *edit, h uint64, n *Node, shift int) *trie {
	if t == nil {
		return nil
	}
	if shift >= 64 {
		i := slices.IndexFunc(t.kids, func(k kid) bool { return k.node == n })
		if i < 0 {
			return t
		}
		t = t.own(e)
		t.kids = slices.Delete(t.kids, i, i+1)
		return t
	}
	bit := uint32(1) << (h >> shift & 31)
	if t.bitmap&bit == 0 {
		return t
	}
	at := bits.OnesCount32(t.bitmap & (bit - 1))
	k := t.kids[at]
	if k.sub == nil {
		if k.node != n {
			return t
		}
		t = t.own(e)
		t.bitmap &^= bit
		t.kids = slices.Delete(t.kids, at, at+1)
		return t
	}
	sub := k.sub.remove(e, h, n, shift+levelBits)
	if sub == k.sub && sub.owner != e {
		return t // nothing removed
	}
	t = t.own(e)
	switch {
	case len(sub.kids) == 0:
		t.bitmap &^= bit
		t.kids = slices.Delete(t.kids, at, at+1)
	case len(sub.kids) == 1 && sub.kids[0].sub == nil:
		t.kids[at] = sub.kids[0]
	default:
		t.kids[at] = kid{sub: sub}
	}
	return t
}

// list holds nodes by ascending ID in chunks. A change copies one chunk and the
// list of chunks. No chunk is empty.
type list struct {
	chunks [][]*Node
	n      int
}

const chunkMax = 256

// newList makes a list of nodes, which must be sorted by ID, each ID once.
func newList(nodes []*Node) list {
	l := list{n: len(nodes)}
	for c := range slices.Chunk(nodes, chunkMax*3/4) {
		l.chunks = append(l.chunks, slices.Clone(c))
	}
	return l
}

// find returns the place of id: the chunk, the index in it, and whether it is
// there.
func (l list) find(id tailcfg.NodeID) (c, i int, ok bool) {
	c = sort.Search(len(l.chunks), func(c int) bool { return l.chunks[c][0].ID > id }) - 1
	if c < 0 {
		return 0, 0, false
	}
	ch := l.chunks[c]
	i = sort.Search(len(ch), func(i int) bool { return ch[i].ID >= id })
	return c, i, i < len(ch) && ch[i].ID == id
}

func (l list) get(id tailcfg.NodeID) *Node {
	if c, i, ok := l.find(id); ok {
		return l.chunks[c][i]
	}
	return nil
}

// with returns a list that has n.
func (l list) with(n *Node) list {
	if len(l.chunks) == 0 {
		return list{[][]*Node{{n}}, 1}
	}
	c, i, ok := l.find(n.ID)
	chunks := slices.Clone(l.chunks)
	if ok {
		chunks[c] = slices.Clone(chunks[c])
		chunks[c][i] = n
		return list{chunks, l.n}
	}
	ch := make([]*Node, 0, len(chunks[c])+1)
	ch = append(append(append(ch, chunks[c][:i]...), n), chunks[c][i:]...)
	if len(ch) <= chunkMax {
		chunks[c] = ch
	} else {
		chunks[c] = slices.Clone(ch[:len(ch)/2])
		chunks = slices.Insert(chunks, c+1, slices.Clone(ch[len(ch)/2:]))
	}
	return list{chunks, l.n + 1}
}

// without returns a list that does not have id.
func (l list) without(id tailcfg.NodeID) list {
	c, i, ok := l.find(id)
	if !ok {
		return l
	}
	chunks := slices.Clone(l.chunks)
	if len(chunks[c]) == 1 {
		return list{slices.Delete(chunks, c, c+1), l.n - 1}
	}
	ch := make([]*Node, 0, len(chunks[c])-1)
	chunks[c] = append(append(ch, chunks[c][:i]...), chunks[c][i+1:]...)
	return list{chunks, l.n - 1}
}
