// Package http1 reads and writes messages of HTTP/1.1 (RFC 9112), as much of it as the node needs: the fetch
// of control's key, the switches of protocol, proxies, probes and routers. It dials nothing and keeps
// no connections.
//
// Why not net/http: its client brings the machinery of connection pools, HTTP/2, redirects and cookies with it,
// which is 0.9 MB in every program that embeds a node (docs/performance.md § Size).
package http1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

const (
	// maxHead bounds the lines before a body, and those after a chunked one.
	maxHead = 64 << 10
	// maxInterim bounds the answers of the class 1xx before the final one.
	maxInterim = 8
)

// ErrMalformed is wrapped by the error of a message that is not HTTP/1, or too long.
var ErrMalformed = errors.New("http1: malformed message")

// Field is a header field.
type Field struct{ Name, Value string }

// Header holds the fields of a message in their order.
type Header []Field

// Get returns the first value of a field, whatever the case of its name, or "".
func (h Header) Get(name string) string {
	for _, f := range h {
		if strings.EqualFold(f.Name, name) {
			return f.Value
		}
	}
	return ""
}

// Has reports whether a comma-separated list under name has token, whatever the case of both.
func (h Header) Has(name, token string) bool {
	for _, f := range h {
		if !strings.EqualFold(f.Name, name) {
			continue
		}
		for v := range strings.SplitSeq(f.Value, ",") {
			if strings.EqualFold(strings.TrimSpace(v), token) {
				return true
			}
		}
	}
	return false
}

// Request is a request as it is read.
type Request struct {
	Method, Target string
	Header         Header
	Body           io.Reader // never nil; ends with io.EOF, or io.ErrUnexpectedEOF where it is cut
}

// Response is a response as it is read.
type Response struct {
	Status int
	Reason string
	Header Header
	Body   io.Reader // never nil; ends with io.EOF, or io.ErrUnexpectedEOF where it is cut
	// KeepAlive says that the connection is good for another request once Body was read to its end.
	KeepAlive bool
}

// AppendRequest appends a request. A body comes with its length, and so does the absence of one for a POST. It
// fails where what it is given would not stay in its place: a line break in a value, a space in the target.
func AppendRequest(b []byte, method, target, host string, h Header, body []byte) ([]byte, error) {
	if !visible(target) || !visible(host) || !token(method) {
		return b, fmt.Errorf("%w: method %q, target %q, host %q", ErrMalformed, method, target, host)
	}
	b = append(b, method+" "+target+" HTTP/1.1\r\nHost: "+host+"\r\n"...)
	for _, f := range h {
		if !token(f.Name) || strings.ContainsAny(f.Value, "\r\n\x00") {
			return b, fmt.Errorf("%w: the field %q", ErrMalformed, f.Name)
		}
		b = append(b, f.Name+": "+f.Value+"\r\n"...)
	}
	if len(body) > 0 || method == "POST" {
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, int64(len(body)), 10)
		b = append(b, "\r\n"...)
	}
	b = append(b, "\r\n"...)
	return append(b, body...), nil
}

// AppendResponse appends a response with its body and no other fields than h and the length.
func AppendResponse(b []byte, status int, reason string, h Header, body []byte) []byte {
	b = append(b, "HTTP/1.1 "+strconv.Itoa(status)+" "+reason+"\r\n"...)
	for _, f := range h {
		b = append(b, f.Name+": "+f.Value+"\r\n"...)
	}
	b = append(b, "Content-Length: "+strconv.Itoa(len(body))+"\r\n\r\n"...)
	return append(b, body...)
}

// ReadResponse reads the head of the final answer to a request of that method, past answers of the class 1xx but
// 101. It blocks as long as br's reader does. io.EOF means that nothing came at all.
func ReadResponse(br *bufio.Reader, method string) (*Response, error) {
	for range maxInterim {
		line, h, err := head(br)
		if err != nil {
			return nil, err
		}
		proto, rest, _ := strings.Cut(line, " ")
		code, reason, _ := strings.Cut(strings.TrimLeft(rest, " "), " ")
		status, err := strconv.Atoi(code)
		if !version(proto) || err != nil || len(code) != 3 || status < 100 {
			return nil, fmt.Errorf("%w: it begins with %q", ErrMalformed, clip(line))
		}
		if status < 200 && status != 101 {
			continue
		}
		r := &Response{Status: status, Reason: reason, Header: h, KeepAlive: proto == "HTTP/1.1" && !h.Has("Connection", "close")}
		if status == 101 || status == 204 || status == 304 || method == "HEAD" || method == "CONNECT" && status < 300 {
			r.Body = empty{} // RFC 9112 §6.3, 1 and 2
			return r, nil
		}
		body, err := body(br, h)
		if err != nil {
			return nil, err
		}
		if body == nil { // RFC 9112 §6.3, 8: until the connection ends
			r.Body, r.KeepAlive = br, false
		} else {
			r.Body = body
		}
		return r, nil
	}
	return nil, fmt.Errorf("%w: no final answer", ErrMalformed)
}

// ReadRequest reads the head of a request.
func ReadRequest(br *bufio.Reader) (*Request, error) {
	line, h, err := head(br)
	if err != nil {
		return nil, err
	}
	method, rest, _ := strings.Cut(line, " ")
	target, proto, _ := strings.Cut(rest, " ")
	if !token(method) || !visible(target) || !version(proto) {
		return nil, fmt.Errorf("%w: it begins with %q", ErrMalformed, clip(line))
	}
	r := &Request{Method: method, Target: target, Header: h, Body: empty{}}
	if b, err := body(br, h); err != nil {
		return nil, err
	} else if b != nil { // else none: RFC 9112 §6.3, 7
		r.Body = b
	}
	return r, nil
}

func version(s string) bool { return s == "HTTP/1.1" || s == "HTTP/1.0" }

// head reads the first line and the header.
func head(br *bufio.Reader) (string, Header, error) {
	left := maxHead
	first, err := line(br, &left)
	if err != nil {
		return "", nil, err
	}
	h, err := fields(br, &left)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return first, h, err
}

// fields reads header lines to the empty one.
func fields(br *bufio.Reader, left *int) (Header, error) {
	var h Header
	for {
		s, err := line(br, left)
		if err != nil || s == "" {
			return h, err
		}
		if n := len(h); n > 0 && (s[0] == ' ' || s[0] == '\t') { // folded: RFC 9112 §5.2
			h[n-1].Value += " " + strings.Trim(s, " \t")
			continue
		}
		name, value, ok := strings.Cut(s, ":")
		if !ok || !token(name) {
			return h, fmt.Errorf("%w: the header line %q", ErrMalformed, clip(s))
		}
		h = append(h, Field{name, strings.Trim(value, " \t")})
	}
}

// line reads a line, without its end, of at most *left bytes.
func line(br *bufio.Reader, left *int) (string, error) {
	var long []byte
	for {
		b, err := br.ReadSlice('\n')
		if *left -= len(b); *left < 0 {
			return "", fmt.Errorf("%w: a head of more than %d bytes", ErrMalformed, maxHead)
		}
		switch {
		case err == bufio.ErrBufferFull:
			long = append(long, b...)
			continue
		case err == io.EOF && len(long)+len(b) > 0:
			return "", io.ErrUnexpectedEOF
		case err != nil:
			return "", err
		}
		if long != nil {
			b = append(long, b...)
		}
		b = bytes.TrimSuffix(b[:len(b)-1], []byte("\r")) // RFC 9112 §2.2: a bare LF is a line's end, too
		return string(b), nil
	}
}

// body returns the body that h announces, nil if it announces none.
func body(br *bufio.Reader, h Header) (io.Reader, error) {
	length := int64(-1)
	chunks := false
	for _, f := range h {
		switch {
		case strings.EqualFold(f.Name, "Transfer-Encoding"):
			if chunks || !strings.EqualFold(f.Value, "chunked") {
				return nil, fmt.Errorf("%w: transfer encoding %q", ErrMalformed, clip(f.Value))
			}
			chunks = true
		case strings.EqualFold(f.Name, "Content-Length"):
			n, err := strconv.ParseUint(f.Value, 10, 63)
			if err != nil || length >= 0 && length != int64(n) {
				return nil, fmt.Errorf("%w: content length %q", ErrMalformed, clip(f.Value))
			}
			length = int64(n)
		}
	}
	switch {
	case chunks: // RFC 9112 §6.3, 3: it overrides a length
		return &chunked{br: br}, nil
	case length == 0:
		return empty{}, nil
	case length > 0:
		return &counted{br, length}, nil
	}
	return nil, nil
}

// empty is a body without bytes.
type empty struct{}

func (empty) Read([]byte) (int, error) { return 0, io.EOF }

// counted is a body of a known length.
type counted struct {
	br   *bufio.Reader
	left int64
}

func (c *counted) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	n, err := c.br.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	if err == io.EOF && c.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// chunked is a body in chunks (RFC 9112 §7.1).
type chunked struct {
	br   *bufio.Reader
	left int64 // of the present chunk
	end  bool  // of a chunk comes next: an empty line
	err  error
}

func (c *chunked) Read(p []byte) (int, error) {
	for c.left == 0 && c.err == nil {
		c.err = c.next()
	}
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.br.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	c.err = err
	return n, err
}

// next reads the line between two chunks, or the trailer after the last.
func (c *chunked) next() error {
	left := 4 << 10
	s, err := line(c.br, &left)
	if err == nil && c.end {
		if s != "" {
			return fmt.Errorf("%w: a chunk does not end where it should", ErrMalformed)
		}
		c.end = false
		s, err = line(c.br, &left)
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	s, _, _ = strings.Cut(s, ";") // extensions
	s = strings.TrimRight(s, " \t")
	n, err := strconv.ParseUint(s, 16, 63)
	if err != nil {
		return fmt.Errorf("%w: chunk size %q", ErrMalformed, clip(s))
	}
	if n > 0 {
		c.left, c.end = int64(n), true
		return nil
	}
	left = maxHead
	if _, err := fields(c.br, &left); err == io.EOF {
		return io.ErrUnexpectedEOF
	} else if err != nil {
		return err
	}
	return io.EOF
}

// token reports whether s can be a method or the name of a field (RFC 9110 §5.6.2).
func token(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f || strings.IndexByte("\"(),/:;<=>?@[\\]{}", s[i]) >= 0 {
			return false
		}
	}
	return s != ""
}

// visible reports whether s is made of visible ASCII, and not empty.
func visible(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return s != ""
}

func clip(s string) string { return s[:min(len(s), 80)] }
