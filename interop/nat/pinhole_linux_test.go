package nat

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/tailnode/tailnode/interop/harness"
)

// pinholes is a PCP server (RFC 6887) that grants whatever is asked for, for the firewall of an IPv6 router.
type pinholes struct {
	pc   net.PacketConn
	born time.Time
	asks []pinhole // guarded by child.mu
}

// pinhole is what somebody asked for.
type pinhole struct {
	From     string // of the packet, with its zone
	Client   string // as it says itself
	Port     uint16
	Lifetime uint32
}

// servePCP answers at the router's link-local address, from which the answers have to come.
func (c *child) servePCP() error {
	pc, err := net.ListenPacket("udp6", "[fe80::1%lan]:5351")
	if err != nil {
		return err
	}
	p := &pinholes{pc: pc, born: time.Now()}
	c.pcp = p
	go func() {
		b := make([]byte, 1100)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			if n < 24 || b[0] != 2 {
				continue
			}
			client := netip.AddrFrom16([16]byte(b[8:]))
			b[1] |= 0x80
			b[3] = 0
			clear(b[8:24])
			binary.BigEndian.PutUint32(b[8:], uint32(time.Since(p.born)/time.Second))
			if b[1] == 0x81 && n >= 60 {
				c.mu.Lock()
				p.asks = append(p.asks, pinhole{from.String(), client.String(), binary.BigEndian.Uint16(b[40:]), binary.BigEndian.Uint32(b[4:])})
				c.mu.Unlock()
				copy(b[42:44], b[40:42])
				a := client.As16()
				copy(b[44:60], a[:])
			}
			pc.WriteTo(b[:n], from)
		}
	}()
	return nil
}

// TestPinhole: behind a router that filters IPv6, our node asks its link-local address for a hole to its own socket, and gives it back.
func TestPinhole(t *testing.T) {
	require(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	l := newLab(ctx, t)
	s := l.newSite(kind{name: "v6fw", v6: true, fw: true})
	// The host's default route is to the router's link-local address, as router advertisements have it.
	l.sh(s.router(), "ip -6 addr add fe80::1/64 dev lan nodad")
	router := startChild(t, l.ns(s.router()), "server")
	if err := router.call(ctx, "pcp", nil, nil); err != nil {
		t.Fatal(err)
	}
	host := s.host()
	l.sh(host, "ip -6 route replace default via fe80::1 dev eth0")
	n, err := l.startOn(ctx, s, host, "ours", upArgs{Hostname: "inside"})
	if err != nil {
		t.Fatal(err)
	}
	asked := func() (list []pinhole) {
		if err := router.call(ctx, "pinholes", nil, &list); err != nil {
			t.Fatal(err)
		}
		return list
	}
	if err := harness.Until(ctx, "the node to ask for a hole", func() (bool, error) { return len(asked()) > 0, nil }); err != nil {
		t.Fatal(err)
	}
	self := fmt.Sprintf("2001:db8:%d:1::10", s.n)
	for _, a := range asked() {
		from, err := netip.ParseAddrPort(a.From)
		if err != nil || from.Addr().String() != self || a.Client != self || a.Port == 0 || a.Lifetime == 0 {
			t.Errorf("%+v, %v", a, err)
		}
	}
	port := asked()[0].Port
	n.close()
	if err := harness.Until(ctx, "the node to give it back", func() (bool, error) {
		last := asked()
		return last[len(last)-1].Lifetime == 0 && last[len(last)-1].Port == port, nil
	}); err != nil {
		t.Error(err)
	}
}
