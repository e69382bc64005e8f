package nat

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/interop/harness"
)

// staticPort is the port that nodes with a static mapping are given.
const staticPort = 41641

// proxyPort is where an HTTP proxy runs, beside the coordination server.
const proxyPort = 3128

// place is where a node is put.
type place struct {
	site *site
	args upArgs
}

// scenarios are pairs whose networks have to do with each other, or with an administrator's doing. make returns where the two are.
var scenarios = []struct {
	name   string
	make   func(l *lab) (a, b place)
	direct bool
	by     string // what the address begins with at which the first reaches the second, if it matters
}{
	{"one LAN behind a cone", func(l *lab) (a, b place) {
		s := l.newSite(kind{name: "cone", v4: true, nat: cone})
		return place{site: s}, place{site: s}
	}, true, "192.168.1."},
	{"one LAN behind a symmetric NAT", func(l *lab) (a, b place) {
		s := l.newSite(kind{name: "symmetric", v4: true, nat: symmetric})
		return place{site: s}, place{site: s}
	}, true, "192.168.1."},
	{"full cones", func(l *lab) (a, b place) {
		k := kind{name: "fullcone", v4: true, nat: cone, full: true}
		return place{site: l.newSite(k)}, place{site: l.newSite(k)}
	}, true, ""},
	{"full cone and symmetric", func(l *lab) (a, b place) {
		return place{site: l.newSite(kind{name: "fullcone", v4: true, nat: cone, full: true})}, place{site: l.newSite(kind{name: "symmetric", v4: true, nat: symmetric})}
	}, true, ""},
	{"forwarded port and symmetric", func(l *lab) (a, b place) {
		return place{site: l.newSite(kind{name: "symmetric", v4: true, nat: symmetric})},
			place{l.newSite(kind{name: "forward", v4: true, nat: symmetric, forward: staticPort}), upArgs{Port: staticPort}}
	}, true, ""},
	{"two homes of a carrier that hairpins", func(l *lab) (a, b place) {
		homes := l.newHomes(l.newCarrier(true))
		return place{site: homes[0]}, place{site: homes[1]}
	}, true, "198.18."},
	{"two homes of a carrier that does not", func(l *lab) (a, b place) {
		homes := l.newHomes(l.newCarrier(false))
		return place{site: homes[0]}, place{site: homes[1]}
	}, false, ""},
	{"nothing but an HTTP proxy", func(l *lab) (a, b place) {
		only := fmt.Sprintf("ip daddr %s tcp dport { %d, %d }", serverIP4(coordSite), coordPort, proxyPort)
		return place{site: l.newSite(kind{name: "cone", v4: true, nat: cone})},
			place{l.newSite(kind{name: "proxied", v4: true, nat: cone, only: only}),
				upArgs{Env: []string{fmt.Sprintf("HTTPS_PROXY=http://%s:%d", serverIP4(coordSite), proxyPort)}}}
	}, false, ""},
}

// TestSites: nodes in one network, behind one carrier, with a static mapping, or with a proxy.
func TestSites(t *testing.T) {
	require(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	l := newLab(ctx, t)
	if err := l.coord.call(ctx, "proxy", fmt.Sprintf(":%d", proxyPort), nil); err != nil {
		t.Fatal(err)
	}
	pairs := [][2]string{{"ours", "ours"}}
	if !testing.Short() {
		pairs = append(pairs, [2]string{"ours", "upstream"}, [2]string{"upstream", "ours"})
	}
	group := inParallel(t, atOnce)
	for i, sc := range scenarios {
		for _, who := range pairs {
			group.run(func() error {
				r, err := checkSites(ctx, l, fmt.Sprintf("s%d-%s-%s", i, who[0], who[1]), who, sc.make, sc.direct, sc.by)
				if err != nil {
					return fmt.Errorf("%s, %s dials %s: %w", sc.name, who[0], who[1], err)
				}
				path := "relay"
				if !r.probe.Direct.IsZero() {
					path = fmt.Sprintf("direct by %s after %d ms, back %d ms", r.probe.Path.Addr, r.probe.Direct.Sub(r.probe.Began).Milliseconds(), r.back.Milliseconds())
				}
				t.Logf("%-36s %-8s -> %-8s %s", sc.name, who[0], who[1], path)
				return nil
			})
		}
	}
	group.wait()
}

func checkSites(ctx context.Context, l *lab, name string, who [2]string, mk func(*lab) (a, b place), direct bool, by string) (result, error) {
	a, b := mk(l)
	var nodes [2]*proc
	for i, p := range []place{a, b} {
		p.args.Hostname = fmt.Sprintf("%s-%c", name, 'a'+i)
		n, err := l.startNode(ctx, p.site, who[i], p.args)
		if err != nil {
			return result{}, err
		}
		defer n.close()
		nodes[i] = n
	}
	for _, p := range [][2]*proc{{nodes[0], nodes[1]}, {nodes[1], nodes[0]}} {
		if err := harness.Until(ctx, p[0].name+" to know "+p[1].name, func() (bool, error) {
			r, err := p[0].path(ctx, p[1])
			return err == nil && r.Relay != "", nil
		}); err != nil {
			return result{}, err
		}
	}
	r, err := meet(ctx, nodes[0], nodes[1], direct)
	if err != nil {
		return r, err
	}
	if by != "" {
		// The first path need not be the last: a LAN's is better.
		err = harness.Until(ctx, "a path by "+by, func() (bool, error) {
			p, err := nodes[0].path(ctx, nodes[1])
			if ap, e := netip.ParseAddrPort(p.Addr); e == nil && strings.HasPrefix(ap.Addr().String(), by) {
				return true, nil
			}
			return false, err
		})
	}
	return r, err
}
