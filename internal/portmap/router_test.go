package portmap

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailnode/tailnode/internal/memnet"
)

var (
	gwAddr   = netip.MustParseAddr("192.168.1.1")
	selfAddr = netip.MustParseAddr("192.168.1.7")
	extAddr  = netip.MustParseAddr("203.0.113.9")
	gw6Addr  = netip.MustParseAddr("fd00::1")
	self6    = netip.MustParseAddr("2001:db8:1::7")
)

// router is a fake one. The fields may be changed by set.
type router struct {
	t    *testing.T
	net  *memnet.Network
	host *memnet.Host

	mu             sync.Mutex
	pcp, pmp, upnp bool
	ext            netip.Addr
	port           uint16 // given to whoever asks; 0: what is suggested
	lifetime       uint32 // PMP and PCP
	result         uint16 // of mapping requests
	booted         time.Time
	lose           int  // requests to lose
	pmpAnswersPCP  bool // with an unsupported version
	stray          bool // answers come from another address first, with lies
	wrongNonce     bool
	wrongPort      bool // in a reply's internal port
	services       []string
	down           map[string]bool // service types that are not connected
	location       string
	urlBase        string
	upnpErrors     []int // of Add…, one after the other
	description    string
	raw            string // whole answer to any HTTP request, if not ""

	log   []string
	stop  []func() error
	wg    sync.WaitGroup
	other *memnet.PacketConn
}

func newRouter(t *testing.T) *router {
	r := &router{
		t: t, ext: extAddr, lifetime: 7200, booted: time.Now().Add(-time.Hour), down: map[string]bool{},
		services: serviceTypes[:1], location: "http://192.168.1.1:5000/desc/root.xml",
	}
	r.net = memnet.New(1, memnet.Link{Latency: time.Millisecond})
	r.host = r.net.Host(selfAddr.String(), self6.String())
	gw := r.net.Host(gwAddr.String(), gw6Addr.String())
	pc6, err := gw.ListenPacket("udp6", ":5351")
	if err != nil {
		t.Fatal(err)
	}
	r.serve(pc6, pc6, r.pxp)
	group := r.net.Host("239.255.255.250")
	r.udp(gw, 5351, r.pxp)
	answer := r.udp(gw, 1900, r.ssdp)
	r.other = r.udp(r.net.Host("192.168.1.66"), 5351, nil)
	pc, err := group.ListenPacket("udp4", ":1900")
	if err != nil {
		t.Fatal(err)
	}
	r.serve(pc, answer, r.ssdp)
	l, err := gw.Listen("tcp4", ":5000")
	if err != nil {
		t.Fatal(err)
	}
	r.stop = append(r.stop, l.Close)
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.wg.Go(func() { r.http(c); c.Close() })
		}
	})
	return r
}

func (r *router) close() {
	for _, f := range r.stop {
		f()
	}
	r.wg.Wait()
}

func (r *router) set(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

func (r *router) note(format string, args ...any) {
	r.log = append(r.log, fmt.Sprintf(format, args...))
}

// took returns what was asked since the last call.
func (r *router) took() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.log
	r.log = nil
	return l
}

func (r *router) udp(h *memnet.Host, port int, f func(b []byte, src netip.AddrPort) [][]byte) *memnet.PacketConn {
	pc, err := h.ListenPacket("udp4", fmt.Sprintf(":%d", port))
	if err != nil {
		r.t.Fatal(err)
	}
	r.serve(pc, pc, f)
	return pc
}

func (r *router) serve(pc, from *memnet.PacketConn, f func(b []byte, src netip.AddrPort) [][]byte) {
	r.stop = append(r.stop, pc.Close)
	r.wg.Go(func() {
		b := make([]byte, 2048)
		for {
			n, src, err := pc.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if f == nil {
				continue
			}
			r.mu.Lock()
			out := f(b[:n], src)
			r.mu.Unlock()
			for _, o := range out {
				from.WriteToUDPAddrPort(o, src)
			}
		}
	})
}

func (r *router) epoch() uint32 { return uint32(time.Since(r.booted) / time.Second) }

func (r *router) pxp(b []byte, src netip.AddrPort) [][]byte {
	if r.lose > 0 {
		r.lose--
		return nil
	}
	var out []byte
	switch {
	case r.pmp && len(b) == 2 && b[0] == 0 && b[1] == 0:
		out = append(binary.BigEndian.AppendUint32([]byte{0, 128, 0, 0}, r.epoch()), r.ext.AsSlice()...)
	case r.pmp && len(b) == 12 && b[0] == 0 && b[1] == 1:
		internal, want := binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
		life := binary.BigEndian.Uint32(b[8:])
		if life == 0 {
			r.note("pmp delete %d", internal)
			want = 0
		} else {
			r.note("pmp map %d suggest %d", internal, want)
			life = r.lifetime
			if r.port != 0 {
				want = r.port
			}
		}
		if r.wrongPort {
			internal++
		}
		out = binary.BigEndian.AppendUint32([]byte{0, 129, byte(r.result >> 8), byte(r.result)}, r.epoch())
		out = binary.BigEndian.AppendUint16(out, internal)
		out = binary.BigEndian.AppendUint16(out, want)
		out = binary.BigEndian.AppendUint32(out, life)
	case r.pcp && len(b) >= 24 && b[0] == 2:
		if c := netip.AddrFrom16([16]byte(b[8:])).Unmap(); c != src.Addr() {
			r.note("pcp for %v from %v", c, src.Addr()) // RFC 6887 §8.1: they must be the same
		}
		out = slices.Clone(b)
		out[1] |= 0x80
		copy(out[8:24], make([]byte, 16))
		binary.BigEndian.PutUint32(out[8:], r.epoch())
		if b[1] == 0 {
			break
		}
		out[3] = byte(r.result)
		internal, want := binary.BigEndian.Uint16(b[40:]), binary.BigEndian.Uint16(b[42:])
		if binary.BigEndian.Uint32(b[4:]) == 0 {
			r.note("pcp delete %d", internal)
			break
		}
		r.note("pcp map %d suggest %d", internal, want)
		binary.BigEndian.PutUint32(out[4:], r.lifetime)
		if r.port != 0 {
			binary.BigEndian.PutUint16(out[42:], r.port)
		}
		a := r.ext.As16()
		copy(out[44:], a[:])
		if r.wrongNonce {
			out[24]++
		}
		if r.wrongPort {
			out[41]++
		}
	case r.pmp && r.pmpAnswersPCP && len(b) >= 24 && b[0] == 2:
		out = binary.BigEndian.AppendUint32([]byte{0, 128 | b[1], 0, 1}, r.epoch())
	}
	if out == nil {
		return nil
	}
	if r.stray {
		lie := slices.Clone(out)
		if lie[0] == 2 && len(lie) >= 60 {
			lie[43]++
		}
		r.other.WriteToUDPAddrPort(lie, src)
		return nil
	}
	return [][]byte{out, out} // networks duplicate
}

func (r *router) ssdp(b []byte, _ netip.AddrPort) [][]byte {
	if !r.upnp || !strings.HasPrefix(string(b), "M-SEARCH * HTTP/1.1\r\n") {
		return nil
	}
	return [][]byte{
		[]byte("HTTP/1.1 200 OK\r\nST: upnp:rootdevice\r\nUSN: uuid:1::urn:printer\r\nLOCATION: http://192.168.1.1:5000/printer.xml\r\n\r\n"),
		[]byte("HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\nUSN: uuid:2\r\nLOCATION: " + r.location + "\r\n\r\n"),
	}
}

func (r *router) http(c net.Conn) {
	req, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return
	}
	body, _ := io.ReadAll(req.Body)
	r.mu.Lock()
	defer r.mu.Unlock()
	reply := func(status int, body string) {
		fmt.Fprintf(c, "HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
	}
	if r.raw != "" {
		io.WriteString(c, r.raw)
		return
	}
	if req.Method == "GET" {
		r.note("get %s", req.URL)
		if r.description != "" {
			reply(200, r.description)
			return
		}
		var b strings.Builder
		b.WriteString(`<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0">` + r.urlBase + `<device><friendlyName>a &gt; b</friendlyName><serviceList>`)
		for i, s := range append([]string{"urn:schemas-upnp-org:service:Layer3Forwarding:1"}, r.services...) {
			fmt.Fprintf(&b, "<service><serviceType>%s</serviceType><serviceId>x</serviceId><controlURL>ctl/%d</controlURL></service>", s, i)
		}
		b.WriteString("</serviceList></device></root>")
		reply(200, b.String())
		return
	}
	typ, action, _ := strings.Cut(strings.Trim(req.Header.Get("SOAPAction"), `"`), "#")
	arg := func(name string) string { v, _ := element(body, name); return v }
	answer := func(inner string) {
		reply(200, fmt.Sprintf(`<s:Envelope><s:Body><u:%sResponse xmlns:u="%s">%s</u:%sResponse></s:Body></s:Envelope>`, action, typ, inner, action))
	}
	switch action {
	case "GetStatusInfo":
		status := "Connected"
		if r.down[typ] {
			status = "Disconnected"
		}
		answer("<NewConnectionStatus>" + status + "</NewConnectionStatus>")
	case "GetExternalIPAddress":
		answer("<NewExternalIPAddress>" + r.ext.String() + "</NewExternalIPAddress>")
	case "AddPortMapping", "AddAnyPortMapping":
		r.note("%s%s %s to %s:%s lease %s", action, typ[len(typ)-2:], arg("NewProtocol"), arg("NewInternalClient"), arg("NewInternalPort"), arg("NewLeaseDuration"))
		if len(r.upnpErrors) > 0 {
			code := r.upnpErrors[0]
			r.upnpErrors = r.upnpErrors[1:]
			if code != 0 {
				reply(500, fmt.Sprintf(`<s:Envelope><s:Body><s:Fault><faultcode>s:Client</faultcode><detail><UPnPError xmlns="x"><errorCode>%d</errorCode></UPnPError></detail></s:Fault></s:Body></s:Envelope>`, code))
				return
			}
		}
		port := arg("NewExternalPort")
		if r.port != 0 {
			port = fmt.Sprint(r.port)
		}
		answer("<NewReservedPort>" + port + "</NewReservedPort>")
	case "DeletePortMapping":
		r.note("DeletePortMapping %s", arg("NewProtocol"))
		answer("")
	default:
		reply(500, "")
	}
}

// client returns a client of the router's, and a channel on which its changes are told.
func (r *router) client(change func(*Config)) (*Client, chan struct{}) {
	changed := make(chan struct{}, 100)
	cfg := Config{
		LocalPort: func() uint16 { return 41641 },
		Changed:   func() { changed <- struct{}{} },
		Gateway:   func() (netip.Addr, netip.Addr, error) { return gwAddr, selfAddr, nil },
		ListenPacket: func(_ context.Context, network, address string) (net.PacketConn, error) {
			pc, err := r.host.ListenPacket(network, address)
			if err != nil {
				return nil, err
			}
			return pc, nil
		},
		DialContext: r.host.DialContext,
	}
	if change != nil {
		change(&cfg)
	}
	return New(cfg), changed
}
