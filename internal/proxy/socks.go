package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"strconv"
)

// SOCKS5 (RFC 1928), the client's side of CONNECT, with a user and password where p has them (RFC 1929).
const (
	socksVersion  = 5
	socksNone     = 0
	socksPassword = 2
	socksConnect  = 1
	socksV4       = 1
	socksName     = 3
	socksV6       = 4
)

// socks asks the proxy p at the other end of c for a connection to target. Names are left to the proxy to resolve.
func socks(c net.Conn, p *url.URL, target string) error {
	host, portText, err := net.SplitHostPort(target)
	if err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return fmt.Errorf("proxy: port %q", portText)
	}
	password, _ := p.User.Password()
	user := p.User.Username()
	if len(user) > 255 || len(password) > 255 || len(host) > 255 {
		return errors.New("proxy: more than SOCKS can say")
	}
	method := byte(socksNone)
	if p.User != nil {
		method = socksPassword
	}
	if _, err := c.Write([]byte{socksVersion, 1, method}); err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	var b [4]byte
	answer := func(b []byte) error {
		if _, err := io.ReadFull(c, b); err != nil {
			return fmt.Errorf("proxy: no answer: %w", err)
		}
		return nil
	}
	if err := answer(b[:2]); err != nil {
		return err
	}
	if b[0] != socksVersion || b[1] != method {
		return fmt.Errorf("%w: it does not speak SOCKS5 that way", ErrRefused)
	}
	if method == socksPassword {
		m := append([]byte{1, byte(len(user))}, user...)
		m = append(append(m, byte(len(password))), password...)
		if _, err := c.Write(m); err != nil {
			return fmt.Errorf("proxy: %w", err)
		}
		if err := answer(b[:2]); err != nil {
			return err
		}
		if b[1] != 0 {
			return fmt.Errorf("%w: not for this user and password", ErrRefused)
		}
	}
	m := []byte{socksVersion, socksConnect, 0}
	switch ip, err := netip.ParseAddr(host); {
	case err != nil:
		m = append(append(m, socksName, byte(len(host))), host...)
	case ip.Is4():
		m = append(append(m, socksV4), ip.AsSlice()...)
	default:
		m = append(append(m, socksV6), ip.AsSlice()...)
	}
	if _, err := c.Write(append(m, byte(port>>8), byte(port))); err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	if err := answer(b[:]); err != nil {
		return err
	}
	if b[0] != socksVersion || b[1] != 0 {
		return fmt.Errorf("%w: SOCKS reply %d", ErrRefused, b[1])
	}
	var rest int // the address that the proxy bound, of no interest
	switch b[3] {
	case socksV4:
		rest = 4
	case socksV6:
		rest = 16
	case socksName:
		if err := answer(b[:1]); err != nil {
			return err
		}
		rest = int(b[0])
	default:
		return fmt.Errorf("%w: SOCKS address of type %d", ErrRefused, b[3])
	}
	return answer(make([]byte, rest+2))
}
