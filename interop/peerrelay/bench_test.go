package peerrelay

import (
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"tailscale.com/net/udprelay"
	tkey "tailscale.com/types/key"
	"tailscale.com/types/views"
	"tailscale.com/util/usermetric"

	"github.com/tailnode/tailnode/internal/disco"
	"github.com/tailnode/tailnode/internal/key"
	"github.com/tailnode/tailnode/internal/peerrelay"
	"github.com/tailnode/tailnode/internal/udp"
)

// BenchmarkRelay sends batches of sealed-sized datagrams from one client to another through a relay on loopback, ours and upstream's,
// at most so many under way that none is lost.
func BenchmarkRelay(b *testing.B) {
	at := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	b.Run("ours", func(b *testing.B) {
		s, err := peerrelay.Open(peerrelay.Config{})
		if err != nil {
			b.Fatal(err)
		}
		defer s.Close()
		v4, _ := s.Ports()
		s.SetLocal([]netip.Addr{at})
		relay(b, func(x, y key.DiscoPublic) disco.RelayEndpoint {
			ch := make(chan disco.RelayEndpoint, 1)
			s.Allocate(x, y, func(ep disco.RelayEndpoint) { ch <- ep })
			ep := <-ch
			ep.Addrs = []netip.AddrPort{netip.AddrPortFrom(at, v4)}
			return ep
		})
	})
	b.Run("upstream", func(b *testing.B) {
		const port = 41414
		s, err := udprelay.NewServer(func(string, ...any) {}, port, true, new(usermetric.Registry), nil)
		if err != nil {
			b.Skip(err)
		}
		defer s.Close()
		addr := netip.AddrPortFrom(at, port)
		s.SetStaticAddrPorts(views.SliceOf([]netip.AddrPort{addr}))
		relay(b, func(x, y key.DiscoPublic) disco.RelayEndpoint {
			ep, err := s.AllocateEndpoint(theirs(x), theirs(y))
			if err != nil {
				b.Fatal(err)
			}
			return disco.RelayEndpoint{Server: key.DiscoPublicFromRaw([32]byte(ep.ServerDisco.AppendTo(nil))), VNI: ep.VNI, Addrs: []netip.AddrPort{addr}}
		})
	})
}

func theirs(k key.DiscoPublic) (t tkey.DiscoPublic) {
	text, _ := k.MarshalText()
	if err := t.UnmarshalText(text); err != nil {
		panic(err)
	}
	return t
}

const (
	segSize  = 1312 + disco.GeneveLen
	segments = 40
	// underWay is how many bytes may be on their way: less than a socket's default buffer.
	underWay = 3 * segments * segSize
)

func relay(b *testing.B, allocate func(x, y key.DiscoPublic) disco.RelayEndpoint) {
	keys := [2]key.DiscoPrivate{key.NewDisco(), key.NewDisco()}
	ep := allocate(keys[0].Public(), keys[1].Public())
	var got atomic.Int64
	more := make(chan struct{}, 1)
	var socks [2]*udp.Sockets
	for i := range socks {
		s, err := udp.Open(udp.Config{})
		if err != nil {
			b.Fatal(err)
		}
		defer s.Close()
		socks[i] = s
		bound := make(chan disco.BindCommon, 1)
		me, other := keys[i], keys[1-i].Public()
		shared := me.Shared(ep.Server)
		s.Start(func(_ int, _ netip.AddrPort, p []byte, _ int) {
			if g, ok := disco.ParseGeneve(p); !ok || !g.Control {
				got.Add(int64(len(p)))
				select {
				case more <- struct{}{}:
				default:
				}
				return
			}
			if plain, err := disco.Open(nil, &shared, p[disco.GeneveLen:]); err == nil {
				if m, err := disco.ParseBind(plain[disco.PlainHeaderLen:]); err == nil {
					bound <- m
				}
			}
		})
		send := func(typ disco.Type, m disco.BindCommon) {
			p := disco.Geneve{VNI: ep.VNI, Protocol: disco.GeneveDisco, Control: true}.Append(nil)
			p = disco.Seal(p, me.Public(), &shared, m.Append(nil, typ))
			s.Send(ep.Addrs[0], p, len(p))
		}
		m := disco.BindCommon{VNI: ep.VNI, Generation: 1, RemoteKey: other}
		send(disco.TypeBindEndpoint, m)
		select {
		case c := <-bound:
			m.Challenge = c.Challenge
		case <-time.After(10 * time.Second):
			b.Fatal("no challenge")
		}
		send(disco.TypeBindEndpointAnswer, m)
	}
	batch := make([]byte, 0, segments*segSize)
	for range segments {
		batch = append(disco.Geneve{VNI: ep.VNI, Protocol: disco.GeneveWireGuard}.Append(batch), make([]byte, segSize-disco.GeneveLen)...)
	}
	for got.Load() == 0 { // the answer is on its way
		socks[0].Send(ep.Addrs[0], batch[:segSize], segSize)
		select {
		case <-more:
		case <-time.After(time.Second):
		}
	}
	b.SetBytes(int64(len(batch)))
	b.ResetTimer()
	start, sent := got.Load(), int64(0)
	for range b.N {
		for sent-(got.Load()-start) > underWay-int64(len(batch)) {
			select {
			case <-more:
			case <-time.After(time.Second):
				b.Fatalf("%d of %d bytes arrived", got.Load()-start, sent)
			}
		}
		if err := socks[0].Send(ep.Addrs[0], batch, segSize); err != nil {
			b.Fatal(err)
		}
		sent += int64(len(batch))
	}
	for got.Load()-start < sent {
		select {
		case <-more:
		case <-time.After(time.Second):
			b.Fatalf("%d of %d bytes arrived", got.Load()-start, sent)
		}
	}
}
