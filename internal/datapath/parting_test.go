package datapath

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/tailcfg"
)

// TestClosePartsFromAll closes a node with many connections, more than are sent for at a time: each peer's end learns of it.
func TestClosePartsFromAll(t *testing.T) {
	a, b := newPair(t)
	ln, err := b.Stack().ListenTCP(netip.AddrPortFrom(netip.IPv6Unspecified(), 80))
	if err != nil {
		t.Fatal(err)
	}
	const n = 2*partingCount + 3
	ends := make(chan error, n)
	accepted := make(chan error, 1)
	go func() {
		for range n {
			c, err := ln.Accept()
			if err != nil {
				accepted <- err
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(2 * time.Minute))
				_, err := io.Copy(io.Discard, c)
				ends <- err
			}()
		}
		accepted <- nil
	}()
	for i := range n {
		dst := b.a4
		if i%2 == 1 {
			dst = b.a6
		}
		if _, err := a.Stack().DialTCP(within(t, 60*time.Second), netip.AddrPortFrom(dst, 80)); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-accepted; err != nil { // a reset that comes before a handshake's last packet ends what nobody has accepted
		t.Fatal(err)
	}
	a.Close()
	for range n {
		if err := <-ends; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the other end reads %v", err)
		}
	}
	ln.Close()
}

// TestAfterPart: while a node that has parted logs out, control may go on, and so may its peers.
func TestAfterPart(t *testing.T) {
	a, b := newPair(t)
	b.listen(80)
	if err := a.dial(time.Minute, netip.AddrPortFrom(b.a4, 80)); err != nil {
		t.Fatal(err)
	}
	a.Part()
	a.Part()
	if _, _, err := b.PingTSMP(within(t, time.Minute), a.a4); err != nil {
		t.Error(err)
	}
	n := a.node()
	n.Addresses = append(n.Addresses, netip.MustParsePrefix("100.64.9.9/32"))
	a.tell(&tailcfg.MapResponse{Node: n})
	a.tell(&tailcfg.MapResponse{PeersRemoved: []tailcfg.NodeID{tailcfg.NodeID(b.id)}})
	if err := a.SetNodeKey(key.NewNode()); err != nil {
		t.Error(err)
	}
	if err := a.dial(time.Minute, netip.AddrPortFrom(b.a4, 80)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a connection after Part: %v", err)
	}
}

func TestPackets(t *testing.T) {
	s := &packets{buf: make([]byte, 0, 3000)}
	dst := make([]byte, 2000)
	for range 2 {
		if s.Next(dst) != 0 {
			t.Error("a packet from nothing")
		}
		for i := range maxPackets {
			if !s.fits(1 + i) {
				t.Fatalf("no room for packet %d", i)
			}
			src := one(strings.Repeat("x", 1+i))
			s.add(&src)
		}
		if s.fits(1) {
			t.Error("room for a packet too many")
		}
		for i := range maxPackets {
			if n := s.Next(dst); !bytes.Equal(dst[:n], bytes.Repeat([]byte("x"), 1+i)) {
				t.Errorf("packet %d: %q", i, dst[:n])
			}
		}
		if s.Next(dst) != 0 {
			t.Error("a packet too many")
		}
		s.reset()
	}
	if src := one(strings.Repeat("x", 2900)); s.fits(3001) {
		t.Error("room for more than there is")
	} else if s.add(&src); s.fits(101) || !s.fits(100) {
		t.Error("the room that is left is not what is left")
	}
}
