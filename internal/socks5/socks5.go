// Package socks5 serves the CONNECT command of SOCKS version 5 (RFC 1928) with a user name and a password (RFC 1929).
package socks5

import (
	"bytes"
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"
)

// Replies to a request (RFC 1928 §6).
const (
	Succeeded          = 0
	GeneralFailure     = 1
	NotAllowed         = 2
	HostUnreachable    = 4
	ConnectionRefused  = 5
	commandUnsupported = 7
	addressUnsupported = 8
)

const (
	version         = 5
	authVersion     = 1 // RFC 1929 §2
	methodPassword  = 2
	methodNone      = 0xff // of those offered
	commandConnect  = 1
	addrIPv4        = 1
	addrName        = 3
	addrIPv6        = 4
	greetingTimeout = 10 * time.Second
	dialTimeout     = time.Minute
)

// Server says what a connection is served with.
type Server struct {
	User, Password string
	Dial           func(ctx context.Context, network, address string) (net.Conn, error)
	Code           func(error) byte // the reply to an error of Dial; nil: GeneralFailure
}

var (
	errProtocol = errors.New("socks5: not the protocol")
	errAuth     = errors.New("socks5: wrong user name or password")
	errGone     = errors.New("socks5: the client has gone")
)

// Serve serves c, closes it and returns when it is over. ctx ends it.
func (s *Server) Serve(ctx context.Context, c net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	c.SetDeadline(time.Now().Add(greetingTimeout))
	if err := s.authenticate(c); err != nil {
		return err
	}
	addr, code, err := readRequest(c)
	if err != nil {
		if code != 0 {
			reply(c, code, netip.AddrPort{})
		}
		return err
	}
	c.SetDeadline(time.Time{})
	out, early, err := s.dial(ctx, c, addr)
	if errors.Is(err, errGone) {
		return err
	}
	if err != nil {
		code := byte(GeneralFailure)
		if s.Code != nil {
			code = s.Code(err)
		}
		reply(c, code, netip.AddrPort{})
		return err
	}
	defer out.Close()
	defer context.AfterFunc(ctx, func() { out.Close() })()
	var bound netip.AddrPort
	if a, ok := out.LocalAddr().(*net.TCPAddr); ok {
		bound = a.AddrPort()
	}
	if err := reply(c, Succeeded, bound); err != nil {
		return err
	}
	return join(c, out, early)
}

// dial dials addr for as long as the client is there, and at most for dialTimeout. It returns what the client has sent meanwhile.
func (s *Server) dial(ctx context.Context, c net.Conn, addr string) (out net.Conn, early []byte, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Not a deadline of the context, with which Dial would wait as long for a name that nobody has.
	defer time.AfterFunc(dialTimeout, func() { cancel(context.DeadlineExceeded) }).Stop()
	first := make([]byte, 1)
	watched := make(chan error, 1)
	go func() {
		n, err := c.Read(first)
		if first = first[:n]; n > 0 {
			err = nil
		}
		if err != nil {
			cancel(errGone)
		}
		watched <- err
	}()
	out, err = s.Dial(ctx, "tcp", addr)
	c.SetReadDeadline(time.Unix(1, 0))
	gone := <-watched
	c.SetReadDeadline(time.Time{})
	if gone != nil && !errors.Is(gone, os.ErrDeadlineExceeded) {
		if err == nil {
			out.Close()
		}
		return nil, nil, fmt.Errorf("%w: %w", errGone, gone)
	}
	return out, first, err
}

// authenticate is RFC 1928 §3 and RFC 1929 §2.
func (s *Server) authenticate(c net.Conn) error {
	var b [256]byte
	if _, err := io.ReadFull(c, b[:2]); err != nil {
		return err
	}
	if b[0] != version {
		return errProtocol
	}
	methods := b[2 : 2+min(int(b[1]), 254)]
	if b[1] == 255 {
		return errProtocol
	}
	if _, err := io.ReadFull(c, methods); err != nil {
		return err
	}
	found := false
	for _, m := range methods {
		found = found || m == methodPassword
	}
	if !found {
		c.Write([]byte{version, methodNone})
		return errAuth
	}
	if _, err := c.Write([]byte{version, methodPassword}); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b[:1]); err != nil {
		return err
	}
	if b[0] != authVersion {
		return errProtocol
	}
	user, err := readText(c)
	if err != nil {
		return err
	}
	password, err := readText(c)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(user, []byte(s.User))&subtle.ConstantTimeCompare(password, []byte(s.Password)) != 1 {
		c.Write([]byte{authVersion, 1})
		return errAuth
	}
	_, err = c.Write([]byte{authVersion, 0})
	return err
}

// readText reads one byte of length and as many bytes.
func readText(r io.Reader) ([]byte, error) {
	var n [1]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return nil, err
	}
	b := make([]byte, n[0])
	_, err := io.ReadFull(r, b)
	return b, err
}

// readRequest is RFC 1928 §4. With an error goes the reply to it; 0: none, for what came is not a request.
func readRequest(r io.Reader) (addr string, code byte, err error) {
	var b [16]byte
	if _, err := io.ReadFull(r, b[:4]); err != nil {
		return "", 0, err
	}
	if b[0] != version {
		return "", 0, errProtocol
	}
	command, typ := b[1], b[3]
	var host string
	switch typ {
	case addrIPv4, addrIPv6:
		n := 4
		if typ == addrIPv6 {
			n = 16
		}
		if _, err := io.ReadFull(r, b[:n]); err != nil {
			return "", 0, err
		}
		ip, _ := netip.AddrFromSlice(b[:n])
		host = ip.Unmap().String()
	case addrName:
		name, err := readText(r)
		if err != nil {
			return "", 0, err
		}
		if host = string(name); !plausible(host) {
			return "", addressUnsupported, fmt.Errorf("socks5: %q is no name", name)
		}
	default:
		return "", addressUnsupported, fmt.Errorf("socks5: address type %d", typ)
	}
	if _, err := io.ReadFull(r, b[:2]); err != nil {
		return "", 0, err
	}
	if command != commandConnect {
		return "", commandUnsupported, fmt.Errorf("socks5: command %d", command)
	}
	return net.JoinHostPort(host, strconv.Itoa(int(b[0])<<8|int(b[1]))), 0, nil
}

// plausible reports whether s can be a host's name or an address as text.
func plausible(s string) bool {
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.', c == ':':
		default:
			return false
		}
	}
	return s != ""
}

// reply is RFC 1928 §6.
func reply(w io.Writer, code byte, bound netip.AddrPort) error {
	b := []byte{version, code, 0, addrIPv4}
	ip := bound.Addr().Unmap()
	if !ip.IsValid() {
		ip = netip.IPv4Unspecified()
	}
	if ip.Is6() {
		b[3] = addrIPv6
	}
	b = append(b, ip.AsSlice()...)
	_, err := w.Write(append(b, byte(bound.Port()>>8), byte(bound.Port())))
	return err
}

// join copies both ways until both have ended, and passes half-closes on. What was read of a before comes first.
func join(a, b net.Conn, early []byte) error {
	done := make(chan error, 2)
	half := func(dst net.Conn, src io.Reader) {
		_, err := io.Copy(dst, src)
		if err == nil {
			if h, ok := dst.(interface{ CloseWrite() error }); ok {
				err = h.CloseWrite()
			}
		}
		if err != nil { // nothing more can be said but that it is over
			a.Close()
			b.Close()
		}
		done <- err
	}
	go half(a, b)
	go half(b, io.MultiReader(bytes.NewReader(early), a))
	return errors.Join(<-done, <-done)
}
