// Package mapframe encodes the messages of map streams, each once for all streams that send it.
package mapframe

import (
	"encoding/binary"
	"encoding/json"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// zenc compresses frames. EncodeAll may be called by many goroutines.
var zenc = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2),
		zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(256<<10))
	if err != nil {
		panic("mapframe: " + err.Error()) // the options are constants
	}
	return e
})

// Frame is one message of a map stream: what goes into it, and after Bytes its encoded form. It must not be changed after that.
type Frame struct {
	From, To uint64 // what it tells: the changes after From, up to To
	Base     tailcfg.MapResponse
	List     string   // "Peers" or "PeersChanged"
	Peers    [][]byte // JSON of the nodes in List

	once [2]sync.Once // plain, compressed
	out  [2][]byte
	err  [2]error
}

// Bytes returns the message with its length in front: 4 bytes, least significant first. It is
// safe for concurrent use, and the work is done once.
func (f *Frame) Bytes(compress bool) ([]byte, error) {
	i := 0
	if compress {
		i = 1
	}
	f.once[i].Do(func() { f.out[i], f.err[i] = f.encode(compress) })
	return f.out[i], f.err[i]
}

func (f *Frame) encode(compress bool) ([]byte, error) {
	base, err := json.Marshal(&f.Base)
	if err != nil {
		return nil, err
	}
	n := 4 + len(base) + len(f.List) + 8
	for _, p := range f.Peers {
		n += len(p) + 1
	}
	b := append(make([]byte, 4, n), base...)
	if len(f.Peers) > 0 {
		b = b[:len(b)-1] // the closing brace
		if len(base) > 2 {
			b = append(b, ',')
		}
		b = append(append(append(b, '"'), f.List...), `":[`...)
		for i, p := range f.Peers {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, p...)
		}
		b = append(b, `]}`...)
	}
	if compress {
		b = zenc().EncodeAll(b[4:], make([]byte, 4, 4+len(b)/4))
	}
	binary.LittleEndian.PutUint32(b, uint32(len(b)-4))
	return b, nil
}

// KeepAlive is the frame that says nothing.
var KeepAlive = &Frame{Base: tailcfg.MapResponse{KeepAlive: true}}

// OrNil returns nil if f says nothing.
func (f *Frame) OrNil() *Frame {
	m := &f.Base
	if len(f.Peers) == 0 && f.List != "Peers" && m.Node == nil && m.PeersRemoved == nil && m.PeersChangedPatch == nil && m.OnlineChange == nil &&
		m.DERPMap == nil && m.UserProfiles == nil && m.PacketFilter == nil && m.PacketFilters == nil && m.PingRequest == nil {
		return nil
	}
	return f
}
