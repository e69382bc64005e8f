package h2

import (
	"encoding/binary"
	"fmt"
	"io"

	"golang.org/x/net/http2/hpack"
)

// Frame types (RFC 9113 §6). Push promises are refused by our settings; others are ignored.
const (
	frameData         = 0
	frameHeaders      = 1
	frameReset        = 3
	frameSettings     = 4
	framePushPromise  = 5
	framePing         = 6
	frameGoAway       = 7
	frameWindowUpdate = 8
	frameContinuation = 9
)

// Flags.
const (
	flagAck        = 1 // of settings and pings
	flagEndStream  = 1
	flagEndHeaders = 4
	flagPadded     = 8
	flagPriority   = 32
)

// Settings (RFC 9113 §6.5.2).
const (
	settingTableSize  = 1
	settingPush       = 2
	settingMaxStreams = 3
	settingWindow     = 4
	settingMaxFrame   = 5
	settingMaxHeaders = 6
)

// What the RFC fixes.
const (
	preface         = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	frameHeaderSize = 9
	minMaxFrame     = 1 << 14 // what every endpoint must take, and all that we take
	maxWindow       = 1<<31 - 1
	defaultWindow   = 1<<16 - 1
)

// What we chose.
const (
	keepBuffer         = 4 << 10 // the largest buffer that an idle connection keeps
	defaultMaxStreams  = 100     // until the server says how many it takes
	maxHeaderBlock     = 64 << 10
	maxContinuation    = 16 // frames of one header block
	maxHeaderListBytes = 64 << 10
)

// Code is an error code (RFC 9113 §7).
type Code uint32

// The codes that this package sends or acts on.
const (
	CodeNo              Code = 0
	CodeProtocol        Code = 1
	CodeFlowControl     Code = 3
	CodeStreamClosed    Code = 5
	CodeFrameSize       Code = 6
	CodeRefusedStream   Code = 7
	CodeCancel          Code = 8
	CodeCompression     Code = 9
	CodeEnhanceYourCalm Code = 11
)

var codeNames = [...]string{"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED", "FRAME_SIZE_ERROR",
	"REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED"}

// String returns the code's name in the RFC.
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("code %d", uint32(c))
}

// A frame begins with its length in three bytes, its type, its flags, and the stream (RFC 9113 §4.1).
func appendFrameHeader(b []byte, n int, typ, flags byte, stream uint32) []byte {
	b = append(b, byte(n>>16), byte(n>>8), byte(n), typ, flags)
	return binary.BigEndian.AppendUint32(b, stream)
}

func appendUint32Frame(b []byte, typ byte, stream, v uint32) []byte {
	return binary.BigEndian.AppendUint32(appendFrameHeader(b, 4, typ, 0, stream), v)
}

// frame is one that was read; payload is good until the next is read.
type frame struct {
	typ, flags byte
	stream     uint32
	payload    []byte
}

func (f *frame) has(flag byte) bool { return f.flags&flag != 0 }

// next reads a frame of at most minMaxFrame bytes.
func (r *receiver) next(from io.Reader) (frame, error) {
	if _, err := io.ReadFull(from, r.hdr[:]); err != nil {
		return frame{}, err
	}
	n := int(r.hdr[0])<<16 | int(r.hdr[1])<<8 | int(r.hdr[2])
	if n > minMaxFrame {
		return frame{}, &ConnError{CodeFrameSize, "a frame too long"}
	}
	if cap(r.buf) < n || cap(r.buf) > keepBuffer && n < keepBuffer/8 {
		size := 512
		for size < n {
			size *= 2
		}
		r.buf = make([]byte, size)
	}
	f := frame{r.hdr[3], r.hdr[4], binary.BigEndian.Uint32(r.hdr[5:]) &^ (1 << 31), r.buf[:n]}
	if _, err := io.ReadFull(from, f.payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	return f, nil
}

// unpad takes the padding off a payload (RFC 9113 §6.1).
func (f *frame) unpad() error {
	if !f.has(flagPadded) {
		return nil
	}
	if len(f.payload) == 0 || int(f.payload[0]) >= len(f.payload) {
		return &ConnError{CodeProtocol, "more padding than frame"}
	}
	f.payload = f.payload[1 : len(f.payload)-int(f.payload[0])]
	return nil
}

// receiver is the reading side's own state.
type receiver struct {
	hdr [frameHeaderSize]byte
	buf []byte
	dec *hpack.Decoder

	// A header block that is not whole yet (RFC 9113 §4.3): nothing else may come in between.
	block  []byte
	stream uint32 // 0: none
	end    bool   // of the stream, with the block
	frames int
}
