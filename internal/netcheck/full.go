package netcheck

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/tailnode/tailnode/internal/stun"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// What only a full check looks for.

func (c *check) portMap() {
	m, err := c.cfg.PortMap(c.ctx)
	c.extra <- func(r *Report) {
		if err == nil {
			r.PMP, r.PCP, r.UPnP = tailcfg.Bool(m.PMP), tailcfg.Bool(m.PCP), tailcfg.Bool(m.UPnP)
		}
	}
}

// hairpin is the state of the check for it.
type hairpin struct {
	mu  sync.Mutex
	tx  stun.TxID // of the datagram that is to come back
	hit bool
}

// saw takes the transaction ID of a STUN request that came to this node.
func (h *hairpin) saw(tx stun.TxID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hit = h.hit || h.tx == tx && tx != stun.TxID{}
}

const (
	hairpinTries = 3
	hairpinWait  = 100 * time.Millisecond
)

// hairpin does as two nodes behind the same NAT would: a second socket learns its outside address from server, and then
// both sockets send to each other's. Each opens the NAT's filter for the other; if either datagram arrives, the NAT hairpins. The
// first socket's outside address is first.
func (c *check) findHairpin(server, first netip.AddrPort) {
	found := tailcfg.OptBool("")
	defer func() { c.extra <- func(r *Report) { r.Hairpin = found } }()
	pc, err := c.cfg.ListenPacket(c.ctx, "udp4", ":0")
	if err != nil {
		return
	}
	defer pc.Close()
	stop := context.AfterFunc(c.ctx, func() { pc.Close() })
	defer stop()
	ask, there, back := stun.NewTxID(), stun.NewTxID(), stun.NewTxID()
	c.loop.mu.Lock()
	c.loop.tx = back
	c.loop.mu.Unlock()
	var second netip.AddrPort
	b := make([]byte, 1500)
	for tries := 0; tries < hairpinTries; {
		if !second.IsValid() {
			pc.WriteTo(stun.AppendRequest(nil, ask), net.UDPAddrFromAddrPort(server))
		} else {
			c.write(STUN4, stun.AppendRequest(nil, there), second)
			pc.WriteTo(stun.AppendRequest(nil, back), net.UDPAddrFromAddrPort(first))
		}
		tries++
		pc.SetReadDeadline(time.Now().Add(hairpinWait))
		for {
			n, _, err := pc.ReadFrom(b)
			if err != nil {
				if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
					break
				}
				return
			}
			if tx, addr, err := stun.ParseResponse(b[:n]); err == nil && tx == ask && !second.IsValid() {
				second, tries = addr, 0
				break
			}
			if tx, err := stun.ParseRequest(b[:n]); err == nil && tx == there {
				found = tailcfg.True
				return
			}
		}
		c.loop.mu.Lock()
		hit := c.loop.hit
		c.loop.mu.Unlock()
		if hit {
			found = tailcfg.True
			return
		}
	}
	if second.IsValid() {
		found = tailcfg.False
	}
}

// latencyCheck measures how long the relay at the other end of conn takes to answer an HTTPS request: one round trip, and
// proof that it is the relay which answers.
func latencyCheck(ctx context.Context, conn net.Conn, n *tailcfg.DERPNode, roots *x509.CertPool) (time.Duration, error) {
	tc := tls.Client(conn, tlsConfig(n, roots))
	if err := tc.HandshakeContext(ctx); err != nil {
		return 0, err
	}
	start := time.Now()
	if _, err := io.WriteString(tc, "GET /derp/latency-check HTTP/1.1\r\nHost: "+host(n)+"\r\nConnection: close\r\n\r\n"); err != nil {
		return 0, err
	}
	br := bufio.NewReaderSize(io.LimitReader(tc, 16<<10), 512)
	if _, err := br.Peek(1); err != nil {
		return 0, err
	}
	d := time.Since(start)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("netcheck: HTTP status %d", resp.StatusCode)
	}
	return d, nil
}

// host returns the relay's name as it can stand in a request.
func host(n *tailcfg.DERPNode) string {
	if n.HostName == "" || strings.ContainsAny(n.HostName, " \t\r\n/") {
		return "relay"
	}
	return n.HostName
}

// tlsConfig verifies the relay as its entry in the map wants it (docs/protocol/derp.md).
func tlsConfig(n *tailcfg.DERPNode, roots *x509.CertPool) *tls.Config {
	cfg := &tls.Config{ServerName: n.HostName, RootCAs: roots, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	if pin, pinned := strings.CutPrefix(n.CertName, "sha256-raw:"); pinned {
		want, err := hex.DecodeString(pin)
		cfg.InsecureSkipVerify = true // VerifyConnection does it
		cfg.VerifyConnection = func(cs tls.ConnectionState) error {
			got := sha256.Sum256(cs.PeerCertificates[0].Raw)
			if err != nil || subtle.ConstantTimeCompare(got[:], want) != 1 {
				return errors.New("netcheck: the relay's certificate is not the one in the map")
			}
			return nil
		}
		return cfg
	}
	if n.CertName != "" {
		cfg.ServerName = n.CertName
	}
	cfg.InsecureSkipVerify = n.InsecureForTests
	return cfg
}

// captive asks a relay by HTTP for what only it can answer: it repeats a random challenge.
func (c *check) captive(p Probe) {
	found, err := c.askCaptive(p.Node)
	if err != nil {
		c.fail() // nobody answered
		return
	}
	c.extra <- func(r *Report) {
		if r.CaptivePortal != tailcfg.True {
			r.CaptivePortal = tailcfg.Bool(found)
		}
	}
}

func (c *check) askCaptive(n *tailcfg.DERPNode) (found bool, err error) {
	conn, err := c.cfg.DialContext(c.ctx, "tcp", net.JoinHostPort(n.IPv4, "80"))
	if err != nil {
		return false, err
	}
	defer conn.Close()
	stop := context.AfterFunc(c.ctx, func() { conn.Close() })
	defer stop()
	challenge := "ts_" + strings.ToLower(rand.Text())
	req := "GET /generate_204 HTTP/1.1\r\nHost: " + n.IPv4 + "\r\nConnection: close\r\nCache-Control: no-cache\r\n" +
		"X-Tailscale-Challenge: " + challenge + "\r\n\r\n"
	if _, err := io.WriteString(conn, req); err != nil {
		return false, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, 64<<10)), nil)
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	return resp.StatusCode != http.StatusNoContent || resp.Header.Get("X-Tailscale-Response") != "response "+challenge, nil
}
