package dns

import (
	"net/netip"
	"strings"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/tailnode/tailnode/internal/netmap"
)

const (
	// Names move with nodes, so answers are kept for a few seconds only.
	ttl         = 5
	negativeTTL = 10

	// maxAnswers keeps the longest answer within 512 bytes (RFC 1035 §2.3.4), so
	// that none is ever truncated.
	maxAnswers = 8
)

// Answer returns the response to a DNS query. forward says that the name is
// none of the tailnet's: whoever has a resolver to forward the query to should
// do so, and otherwise send the response, which is a refusal. The response is nil
// for what must not be answered at all: garbage, and responses. m may be nil.
//
// Answer does not block, and takes time bounded by the size of the query and
// the number of the tailnet's extra records.
func Answer(query []byte, m *netmap.Map) (response []byte, forward bool) {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || h.Response {
		return nil, false
	}
	r := reply{h: dnsmessage.Header{
		ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, RecursionAvailable: h.RecursionDesired,
	}}
	if h.OpCode != 0 {
		return r.fail(dnsmessage.RCodeNotImplemented), false
	}
	q, err := p.Question()
	if err != nil {
		return r.fail(dnsmessage.RCodeFormatError), false
	}
	if _, err := p.Question(); err != dnsmessage.ErrSectionDone {
		return r.fail(dnsmessage.RCodeFormatError), false // RFC 9619: one question
	}
	r.q, r.hasQ = q, true
	if q.Class != dnsmessage.ClassINET {
		return r.fail(dnsmessage.RCodeRefused), false
	}
	name, ok := canonical(q.Name.String())
	if !ok || m == nil {
		return r.fail(dnsmessage.RCodeRefused), true
	}

	r.h.Authoritative = true
	if a, ok := reverseAddr(name); ok {
		return r.reverse(m, name, a)
	}
	addrs, found := resolve(m, name)
	zone, ours := zone(m, name)
	switch {
	case found:
		if zone == "" {
			zone = name // an extra record elsewhere is a zone of its own
		}
		return r.addresses(addrs, zone), false
	case !ours:
		r.h.Authoritative = false
		return r.fail(dnsmessage.RCodeRefused), true
	case name == zone || hasBelow(m, name):
		return r.addresses(nil, zone), false // exists, without data of its own (RFC 8020)
	}
	r.soa = zone
	return r.fail(dnsmessage.RCodeNameError), false
}

// hasBelow reports whether some extra record lies below name.
func hasBelow(m *netmap.Map, name string) bool {
	if m.DNS == nil {
		return false
	}
	for i := range m.DNS.ExtraRecords {
		r, ok := canonical(m.DNS.ExtraRecords[i].Name)
		if ok && r != name && inDomain(r, name) {
			return true
		}
	}
	return false
}

// reply is a response being made.
type reply struct {
	h       dnsmessage.Header
	q       dnsmessage.Question
	hasQ    bool
	answers []dnsmessage.Resource
	soa     string // zone of the SOA record that a negative answer carries (RFC 2308 §3)
}

func (r *reply) addresses(addrs []netip.Addr, zone string) []byte {
	for _, a := range addrs {
		if len(r.answers) == maxAnswers {
			break
		}
		h := dnsmessage.ResourceHeader{Name: r.q.Name, Class: dnsmessage.ClassINET, TTL: ttl}
		all := r.q.Type == dnsmessage.TypeALL
		switch {
		case a.Is4() && (all || r.q.Type == dnsmessage.TypeA):
			r.answers = append(r.answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
		case a.Is6() && (all || r.q.Type == dnsmessage.TypeAAAA):
			r.answers = append(r.answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	if len(r.answers) == 0 {
		if name, _ := canonical(r.q.Name.String()); r.q.Type == dnsmessage.TypeSOA && name == zone {
			if soa, ok := soaRecord(zone); ok {
				r.answers = append(r.answers, soa)
			}
		} else {
			r.soa = zone
		}
	}
	return r.pack()
}

// reverse answers for the name of an address: one of the tailnet's, or one of
// which another resolver may know more.
func (r *reply) reverse(m *netmap.Map, name string, a netip.Addr) ([]byte, bool) {
	owner, ok := Reverse(m, a)
	if !ok {
		zone, ours := zone(m, name)
		if !ours && !range4.Contains(a) && !range6.Contains(a) {
			r.h.Authoritative = false
			return r.fail(dnsmessage.RCodeRefused), true
		}
		if r.soa = zone; zone == "" {
			_, r.soa, _ = strings.Cut(name, ".")
		}
		return r.fail(dnsmessage.RCodeNameError), false
	}
	_, r.soa, _ = strings.Cut(name, ".")
	if r.q.Type == dnsmessage.TypePTR || r.q.Type == dnsmessage.TypeALL {
		target, err := dnsmessage.NewName(owner)
		if err != nil {
			return r.fail(dnsmessage.RCodeServerFailure), false
		}
		r.soa = ""
		r.answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: r.q.Name, Class: dnsmessage.ClassINET, TTL: ttl},
			Body:   &dnsmessage.PTRResource{PTR: target},
		}}
	}
	return r.pack(), false
}

func (r *reply) fail(code dnsmessage.RCode) []byte {
	r.h.RCode = code
	return r.pack()
}

func (r *reply) pack() []byte {
	msg := dnsmessage.Message{Header: r.h, Answers: r.answers}
	if r.hasQ {
		msg.Questions = []dnsmessage.Question{r.q}
	}
	if r.soa != "" {
		if soa, ok := soaRecord(r.soa); ok {
			msg.Authorities = []dnsmessage.Resource{soa}
		}
	}
	b, err := msg.Pack()
	if err != nil {
		// A name from control that no message can hold.
		msg.Answers, msg.Authorities = nil, nil
		msg.RCode = dnsmessage.RCodeServerFailure
		if b, err = msg.Pack(); err != nil {
			return nil
		}
	}
	return b
}

// soaRecord says how long a negative answer may be kept. The other fields mean
// nothing: nobody transfers the zone.
func soaRecord(zone string) (dnsmessage.Resource, bool) {
	name, err := dnsmessage.NewName(zone + ".")
	if err != nil {
		return dnsmessage.Resource{}, false
	}
	return dnsmessage.Resource{
		Header: dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: negativeTTL},
		Body: &dnsmessage.SOAResource{
			NS: name, MBox: name, Serial: 1, Refresh: negativeTTL, Retry: negativeTTL, Expire: negativeTTL, MinTTL: negativeTTL,
		},
	}, true
}

// reverseAddr returns the address whose reverse name (RFC 1035 §3.5, RFC 3596
// §2.5) is name.
func reverseAddr(name string) (a netip.Addr, ok bool) {
	if s, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		labels := strings.Split(s, ".")
		if len(labels) != 4 {
			return a, false
		}
		a, err := netip.ParseAddr(labels[3] + "." + labels[2] + "." + labels[1] + "." + labels[0])
		return a, err == nil && a.Is4()
	}
	s, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(s) != 63 {
		return a, false
	}
	var b [16]byte
	for i := range 32 {
		if i < 31 && s[2*i+1] != '.' {
			return a, false
		}
		d := strings.IndexByte("0123456789abcdef", s[2*i])
		if d < 0 {
			return a, false
		}
		at := 31 - i // the nibble's place from the front
		b[at/2] |= byte(d) << (4 * (1 - at%2))
	}
	return netip.AddrFrom16(b), true
}
