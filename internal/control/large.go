package control

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// largeMap is the size from which on the peers of a map response are decoded one at a time. All at once they would be
// three times the memory that the node keeps of them, and a process of many peers is as large as its largest moment.
const largeMap = 64 << 10

// decodeMap decodes the JSON of a map response. The response of one of at least large bytes has EachPeer in the place of Peers, and
// refers to b.
func decodeMap(b []byte, large int) (*tailcfg.MapResponse, error) {
	m := new(tailcfg.MapResponse)
	key, from, to := -1, 0, 0
	if len(b) >= large && json.Valid(b) {
		key, from, to = member(b, `"Peers"`)
	}
	list := bytes.TrimSpace(b[from:to])
	if key < 0 || list[0] != '[' || list[1+space(list[1:])] == ']' {
		return m, json.Unmarshal(b, m)
	}
	rest := append(append(make([]byte, 0, len(b)-(to-key)+16), b[:key]...), `"Peers":null`...)
	if err := json.Unmarshal(append(rest, b[to:]...), m); err != nil {
		return m, err
	}
	if len(m.Peers) == 0 { // else they are there twice, and the later ones count
		list = list[1 : len(list)-1]
		m.EachPeer = func(f func(*tailcfg.Node) error) error { return eachPeer(list, f) }
	}
	return m, nil
}

// eachPeer decodes the elements of a JSON array that is valid, without its brackets. What it can it reuses for the next one.
func eachPeer(b []byte, f func(*tailcfg.Node) error) error {
	var n tailcfg.Node
	for len(b) > 0 {
		end := value(b)
		addrs, eps, hi := n.Addresses[:0], n.Endpoints[:0], n.Hostinfo
		if hi != nil {
			*hi = tailcfg.Hostinfo{}
		}
		n = tailcfg.Node{Addresses: addrs, Endpoints: eps, Hostinfo: hi}
		p := &n
		if err := json.Unmarshal(b[:end], &p); err != nil {
			return fmt.Errorf("%w: %w", ErrBadMap, err)
		}
		if err := f(p); err != nil {
			return err
		}
		b = b[min(end+1, len(b)):]
	}
	return nil
}

// member finds a member of an object that is valid JSON: where its key and its value begin, and the value's end. The key is
// given in quotes. -1: it is not there.
func member(b []byte, name string) (key, from, to int) {
	i := space(b)
	if b[i] != '{' {
		return -1, 0, 0
	}
	for i++; i < len(b); i++ { // past the comma
		i += space(b[i:])
		if b[i] != '"' {
			break // the end of an empty object
		}
		k := i
		i += text(b[i:])
		found := string(b[k:i]) == name
		i += space(b[i:]) + 1 // past the colon
		i += space(b[i:])
		end := i + value(b[i:])
		if found {
			return k, i, end
		}
		i = end
	}
	return -1, 0, 0
}

// value returns where a value ends: at the comma or bracket behind it, or at the end of b.
func value(b []byte) int {
	depth := 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			i += text(b[i:]) - 1
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth < 0 {
				return i
			}
		case ',':
			if depth == 0 {
				return i
			}
		}
	}
	return len(b)
}

// text returns the length of the string that b begins with, quotes included.
func text(b []byte) int {
	for i := 1; ; i++ {
		i += bytes.IndexAny(b[i:], `"\`)
		if b[i] == '"' {
			return i + 1
		}
		i++ // what is escaped
	}
}

func space(b []byte) int { return len(b) - len(bytes.TrimLeft(b, " \t\r\n")) }
