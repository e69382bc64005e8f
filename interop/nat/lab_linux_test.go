package nat

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A lab is a small Internet: a namespace that routes, servers and sites that hang on it. Its addresses:
//
//	198.18.N.0/30, 2001:db8:N::/64    the link of site N: .1 the Internet's side, .2 the site's
//	198.18.N.8/29, 2001:db8:N:1::/64  public addresses inside site N
//	192.168.1.0/24, 192.168.2.0/24    private addresses inside every site: homes do look alike
//	100.127.N.0/30                    between a carrier's NAT and the home router behind it
//
// Servers are sites 250 (coordination server and relay 1) and 251 (relay 2).
type lab struct {
	t      testing.TB
	prefix string // of the names of its namespaces

	mu    sync.Mutex
	sites int

	coord *proc
}

// labPrefix begins the name of every namespace here; the number of the process that made it follows.
const labPrefix = "tnlab-"

var labs atomic.Int32

const (
	coordSite = 250
	relaySite = 251
	coordPort = 8080
)

// newLab returns a lab with running servers. Everything is gone when t ends.
func newLab(ctx context.Context, t testing.TB) *lab {
	t.Helper()
	require(t)
	l := &lab{t: t, prefix: fmt.Sprintf("%s%d-%d-", labPrefix, os.Getpid(), labs.Add(1))}
	t.Cleanup(func() { removeNamespaces(l.prefix) })
	l.namespace("inet")
	l.sh("inet", `
		sysctl() { echo "$2" >"/proc/sys/net/$1"; }
		sysctl ipv4/ip_forward 1
		sysctl ipv6/conf/all/forwarding 1`)

	relays := make([]relayInfo, 2)
	for i, n := range []int{coordSite, relaySite} {
		name := fmt.Sprintf("server%d", n)
		l.namespace(name)
		l.uplink(n, name)
		p := startChild(t, l.ns(name), "server")
		if err := p.call(ctx, "relay", relayArgs{Host: serverIP4(n), Dir: t.TempDir()}, &relays[i]); err != nil {
			t.Fatal(err)
		}
		relays[i].ID, relays[i].IPv4, relays[i].IPv6 = i+1, serverIP4(n), serverIP6(n)
		if n == coordSite {
			l.coord = p
		}
	}
	if err := l.coord.call(ctx, "coord", coordArgs{
		Addr: fmt.Sprintf(":%d", coordPort), URL: fmt.Sprintf("http://%s:%d", serverIP4(coordSite), coordPort), Relays: relays,
	}, nil); err != nil {
		t.Fatal(err)
	}
	return l
}

func serverIP4(n int) string { return fmt.Sprintf("198.18.%d.2", n) }
func serverIP6(n int) string { return fmt.Sprintf("2001:db8:%d::2", n) }

// require skips the test where namespaces cannot be had, and once sweeps away what a killed run has left behind.
func require(t testing.TB) {
	t.Helper()
	canOnce.Do(func() {
		canErr = can()
		if canErr == nil {
			sweep()
		}
	})
	if canErr != nil {
		t.Skipf("needs network namespaces and nftables: %v", canErr)
	}
}

var (
	canOnce sync.Once
	canErr  error
)

func can() error {
	if os.Getuid() != 0 {
		return errors.New("not root")
	}
	for _, c := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(c); err != nil {
			return fmt.Errorf("there is no %s command", c)
		}
	}
	name := fmt.Sprintf("%s%d-try", labPrefix, os.Getpid())
	defer exec.Command("ip", "netns", "del", name).Run()
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		return fmt.Errorf("ip netns add: %s", bytes.TrimSpace(out))
	}
	cmd := exec.Command("ip", "netns", "exec", name, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader("table ip nat {\nchain post {\ntype nat hook postrouting priority srcnat;\nmasquerade random,fully-random\n}\n}\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %s", bytes.TrimSpace(out))
	}
	return nil
}

// sweep removes the namespaces of test processes that are no more, with what runs in them.
func sweep() {
	for _, name := range namespaces(labPrefix) {
		pid, err := strconv.Atoi(strings.SplitN(strings.TrimPrefix(name, labPrefix), "-", 2)[0])
		if err == nil && pid != os.Getpid() && syscall.Kill(pid, 0) == syscall.ESRCH {
			removeNamespaces(name)
		}
	}
}

func namespaces(prefix string) (names []string) {
	out, _ := exec.Command("ip", "netns", "list").Output()
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 0 && strings.HasPrefix(f[0], prefix) {
			names = append(names, f[0])
		}
	}
	return names
}

// removeNamespaces removes all namespaces whose names begin so, and kills what still runs in them: our children.
func removeNamespaces(prefix string) {
	for _, name := range namespaces(prefix) {
		out, _ := exec.Command("ip", "netns", "pids", name).Output()
		for _, f := range strings.Fields(string(out)) {
			if pid, err := strconv.Atoi(f); err == nil && pid != os.Getpid() {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		exec.Command("ip", "netns", "del", name).Run()
	}
}

func (l *lab) ns(name string) string { return l.prefix + name }

// namespace makes a namespace.
func (l *lab) namespace(name string) {
	l.t.Helper()
	l.sh("", "ip netns add "+l.ns(name))
	l.sh(name, `
		for f in /proc/sys/net/ipv4/conf/*/rp_filter /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 >$f; done
		ip link set lo up`)
}

// sh runs shell commands in a namespace, or in the host's if the name is empty.
func (l *lab) sh(name, script string) {
	l.t.Helper()
	cmd := exec.Command("sh", "-e")
	if name != "" {
		cmd = exec.Command("ip", "netns", "exec", l.ns(name), "sh", "-e")
	}
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		l.t.Fatalf("in %q: %v\n%s\n%s", name, err, script, out)
	}
}

// nft loads rules in a namespace.
func (l *lab) nft(name, rules string) {
	l.t.Helper()
	l.sh(name, "nft -f - <<'END'\n"+rules+"\nEND\n")
}

// uplink joins a namespace to the Internet as site n, by an interface "wan".
func (l *lab) uplink(n int, name string) {
	l.t.Helper()
	l.sh("", fmt.Sprintf("ip -n %s link add s%d type veth peer name wan netns %s", l.ns("inet"), n, l.ns(name)))
	l.sh("inet", fmt.Sprintf(`
		ip addr add 198.18.%[1]d.1/30 dev s%[1]d
		ip addr add 2001:db8:%[1]d::1/64 dev s%[1]d nodad
		ip link set s%[1]d up
		ip route add 198.18.%[1]d.8/29 via 198.18.%[1]d.2
		ip route add 2001:db8:%[1]d:1::/64 via 2001:db8:%[1]d::2`, n))
	l.sh(name, fmt.Sprintf(`
		ip addr add 198.18.%[1]d.2/30 dev wan
		ip addr add 2001:db8:%[1]d::2/64 dev wan nodad
		ip link set wan up
		ip route add default via 198.18.%[1]d.1
		ip route add default via 2001:db8:%[1]d::1`, n))
}

// kind is what the network of a site is like.
type kind struct {
	name    string
	v4, v6  bool
	nat     natKind
	carrier bool // another NAT behind the first, at the carrier
	fw      bool // nothing comes in that was not asked for
	noUDP   bool
	full    bool   // what comes for any port of the router's goes to the first host's: with cone, a full cone
	forward int    // what comes for this UDP port does
	only    string // nothing else gets out, as a rule
}

type natKind int

const (
	public natKind = iota // no NAT
	cone                  // a port inside is one port outside, for every destination
	symmetric
)

// rules are the router's. What comes in unasked for is dropped even where a NAT alone would do, as home routers
// do: otherwise it would take the port that the NAT is about to need.
func (k kind) rules() string {
	var b strings.Builder
	switch k.nat {
	case cone:
		b.WriteString(masquerade(""))
	case symmetric:
		b.WriteString(masquerade("random,fully-random"))
	}
	if ports := k.forwarded(); ports != "" {
		b.WriteString("table ip static {\nchain pre {\ntype nat hook prerouting priority dstnat\niifname \"wan\" udp dport " + ports + " dnat to 192.168.1.10\n}\n}\n")
	}
	b.WriteString("table inet fw {\nchain forward {\ntype filter hook forward priority filter\n")
	if k.only != "" {
		b.WriteString("iifname \"lan\" " + k.only + " accept\niifname \"lan\" drop\n")
	}
	if k.forwarded() != "" {
		b.WriteString("ct status dnat accept\n")
	}
	if k.noUDP {
		b.WriteString("meta l4proto udp drop\n")
	}
	if k.fw || k.nat != public {
		b.WriteString("iifname \"wan\" ct state established,related accept\niifname \"wan\" drop\n")
	}
	b.WriteString("}\nchain input {\ntype filter hook input priority filter\niifname \"wan\" ct state new drop\n}\n}\n")
	return b.String()
}

// forwarded returns the UDP ports that lead to the first host.
func (k kind) forwarded() string {
	switch {
	case k.full:
		return "1024-65535"
	case k.forward != 0:
		return strconv.Itoa(k.forward)
	}
	return ""
}

func masquerade(how string) string {
	return "table ip nat {\nchain post {\ntype nat hook postrouting priority srcnat\noifname \"wan\" masquerade " + how + "\n}\n}\n"
}

// site is a network with a router.
type site struct {
	l     *lab
	n     int
	kind  kind
	nodes int
}

func (s *site) router() string  { return fmt.Sprintf("router%d", s.n) }
func (s *site) carrier() string { return fmt.Sprintf("carrier%d", s.n) }

const routing = `
	echo 1 >/proc/sys/net/ipv4/ip_forward
	echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
`

// shared is a carrier's NAT with several homes behind it. Each has a block of ports to itself (RFC 7422), in which whatever comes is
// passed on: to the outside it is a full cone, and the homes' own NATs filter.
type shared struct {
	l     *lab
	n     int
	homes []int
	made  int // of them
}

// newCarrier makes one; if it hairpins, what a home sends to another's port comes back in.
func (l *lab) newCarrier(hairpin bool) *shared {
	l.t.Helper()
	l.mu.Lock()
	c := &shared{l: l, n: l.sites + 1, homes: []int{l.sites + 2, l.sites + 3}}
	l.sites += 3
	l.mu.Unlock()
	l.namespace(c.name())
	l.uplink(c.n, c.name())
	l.sh(c.name(), routing)
	ext := fmt.Sprintf("198.18.%d.2", c.n)
	in := "iifname \"wan\" "
	if hairpin {
		in = ""
	}
	pre := ""
	for i, h := range c.homes {
		pre += fmt.Sprintf("%sip daddr %s udp dport %d-%d dnat to 100.127.%d.2\n", in, ext, c.ports(i), c.ports(i)+999, h)
	}
	l.nft(c.name(), "table ip nat {\nchain pre {\ntype nat hook prerouting priority dstnat\n"+pre+"}\n"+
		"chain post {\ntype nat hook postrouting priority srcnat\noifname \"wan\" masquerade\n"+
		"ip saddr 100.127.0.0/16 ip daddr 100.127.0.0/16 ct status dnat snat to "+ext+"\n}\n}\n")
	return c
}

func (c *shared) name() string { return fmt.Sprintf("carrier%d", c.n) }

// ports returns the first of the thousand ports of home i.
func (c *shared) ports(i int) int { return 20000 + 10000*i }

// newHomes makes the homes of a carrier, each with a NAT of its own.
func (l *lab) newHomes(c *shared) (homes [2]*site) {
	for i := range homes {
		homes[i] = l.newSiteBehind(kind{name: "home", v4: true, nat: cone}, c)
		homes[i].rebind(c.ports(i)) // into its block
	}
	return homes
}

// newSite makes a site of a kind.
func (l *lab) newSite(k kind) *site { return l.newSiteBehind(k, nil) }

func (l *lab) newSiteBehind(k kind, c *shared) *site {
	l.t.Helper()
	s := &site{l: l, kind: k}
	if c != nil {
		s.n, c.made = c.homes[c.made], c.made+1
	} else {
		l.mu.Lock()
		l.sites++
		s.n = l.sites
		l.mu.Unlock()
	}
	l.namespace(s.router())
	switch {
	case c != nil:
		l.behind(c.name(), s)
	case k.carrier:
		l.namespace(s.carrier())
		l.uplink(s.n, s.carrier())
		l.sh(s.carrier(), routing)
		l.behind(s.carrier(), s)
		l.nft(s.carrier(), kind{nat: cone}.rules())
	default:
		l.uplink(s.n, s.router())
	}
	l.sh(s.router(), routing+"ip link add lan type bridge\nip link set lan up\n")
	if k.v4 {
		if k.nat == public {
			l.sh(s.router(), fmt.Sprintf("ip addr add 198.18.%d.9/29 dev lan", s.n))
		} else {
			l.sh(s.router(), "ip addr add 192.168.1.1/24 dev lan\nip addr add 192.168.2.1/24 dev lan")
		}
	}
	if k.v6 {
		l.sh(s.router(), fmt.Sprintf("ip addr add 2001:db8:%d:1::1/64 dev lan nodad", s.n))
	}
	l.nft(s.router(), k.rules())
	return s
}

// behind joins a site's router to a carrier's.
func (l *lab) behind(carrier string, s *site) {
	l.t.Helper()
	l.sh("", fmt.Sprintf("ip -n %s link add home%d type veth peer name wan netns %s", l.ns(carrier), s.n, l.ns(s.router())))
	l.sh(carrier, fmt.Sprintf(`
		ip addr add 100.127.%[1]d.1/30 dev home%[1]d
		ip link set home%[1]d up`, s.n))
	l.sh(s.router(), fmt.Sprintf(`
		ip addr add 100.127.%[1]d.2/30 dev wan
		ip link set wan up
		ip route add default via 100.127.%[1]d.1`, s.n))
}

// host makes a host in the site's network and returns the name of its namespace.
func (s *site) host() string {
	s.l.t.Helper()
	s.nodes++
	name := fmt.Sprintf("node%d-%d", s.n, s.nodes)
	s.l.namespace(name)
	s.l.sh("", fmt.Sprintf("ip -n %s link add n%d type veth peer name eth0 netns %s", s.l.ns(s.router()), s.nodes, s.l.ns(name)))
	s.l.sh(s.router(), fmt.Sprintf("ip link set n%[1]d master lan\nip link set n%[1]d up", s.nodes))
	s.l.sh(name, "ip link set eth0 up")
	if s.kind.v4 {
		if s.kind.nat == public {
			s.l.sh(name, fmt.Sprintf("ip addr add 198.18.%[1]d.%[2]d/29 dev eth0\nip route add default via 198.18.%[1]d.9", s.n, 9+s.nodes))
		} else {
			s.l.sh(name, fmt.Sprintf("ip addr add 192.168.1.%d/24 dev eth0\nip route add default via 192.168.1.1", 9+s.nodes))
		}
	}
	if s.kind.v6 {
		s.l.sh(name, fmt.Sprintf("ip addr add 2001:db8:%[1]d:1::%[2]d/64 dev eth0 nodad\nip route add default via 2001:db8:%[1]d:1::1", s.n, 9+s.nodes))
	}
	return name
}

// node starts a node, "ours" or "upstream", on a host and waits until it is up.
func (l *lab) node(ctx context.Context, s *site, who, hostname string) (*proc, error) {
	return l.startNode(ctx, s, who, upArgs{Hostname: hostname})
}

// startNode is node with more to say of it.
func (l *lab) startNode(ctx context.Context, s *site, who string, a upArgs) (*proc, error) {
	return l.startOn(ctx, s, s.host(), who, a)
}

// startOn is startNode on a host that is there.
func (l *lab) startOn(ctx context.Context, s *site, host, who string, a upArgs) (*proc, error) {
	var k string
	if err := l.coord.call(ctx, "authkey", nil, &k); err != nil {
		return nil, err
	}
	control := serverIP4(coordSite)
	if !s.kind.v4 {
		control = "[" + serverIP6(coordSite) + "]"
	}
	p := startChild(l.t, l.ns(host), who, a.Env...)
	p.host, p.site, p.name = host, s, a.Hostname
	a.Control, a.AuthKey, a.Dir = fmt.Sprintf("http://%s:%d", control, coordPort), k, l.t.TempDir()
	err := p.call(ctx, "up", a, &p.up)
	if err != nil {
		return nil, fmt.Errorf("%s (%s): %w", a.Hostname, s.kind.name, err)
	}
	return p, nil
}

// cut drops what the rule matches on its way through the site's router; mend lets it through again.
func (s *site) cut(rule string) {
	s.l.nft(s.router(), "table inet cut {\nchain c {\ntype filter hook forward priority -10\n"+rule+" drop\n}\n}\n")
}

func (s *site) mend() { s.l.sh(s.router(), "nft delete table inet cut") }

// rebind makes the NAT forget all mappings and use other ports from now on.
func (s *site) rebind(first int) {
	s.l.nft(s.router(), fmt.Sprintf("delete table ip nat\n"+
		"table ip nat {\nchain post {\ntype nat hook postrouting priority srcnat\n"+
		"oifname \"wan\" meta l4proto udp masquerade to :%d-%d persistent\noifname \"wan\" masquerade\n}\n}\n", first, first+999))
	if err := flushConntrack("/run/netns/" + s.l.ns(s.router())); err != nil {
		s.l.t.Fatal(err)
	}
}

// flushConntrack empties the connection tracking table of a namespace, by the message IPCTNL_MSG_CT_DELETE without
// a tuple (linux/netfilter/nfnetlink_conntrack.h).
func flushConntrack(path string) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and not unlocked: the thread ends with the goroutine, in its foreign namespace
		done <- func() error {
			ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			defer unix.Close(ns)
			if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("setns: %w", err)
			}
			s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
			if err != nil {
				return fmt.Errorf("netlink: %w", err)
			}
			defer unix.Close(s)
			unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60})
			const ctDelete = 1<<8 | 2 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
			m := make([]byte, 20)     // nlmsghdr, and nfgenmsg with AF_UNSPEC
			binary.NativeEndian.PutUint32(m, 20)
			binary.NativeEndian.PutUint16(m[4:], ctDelete)
			binary.NativeEndian.PutUint16(m[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
			if err := unix.Sendto(s, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
				return fmt.Errorf("netlink: %w", err)
			}
			b := make([]byte, 4096)
			n, _, err := unix.Recvfrom(s, b, 0)
			if err != nil {
				return fmt.Errorf("netlink: %w", err)
			}
			if n < 20 {
				return errors.New("netlink: short answer")
			}
			if e := int32(binary.NativeEndian.Uint32(b[16:])); e != 0 {
				return fmt.Errorf("netlink: %w", syscall.Errno(-e))
			}
			return nil
		}()
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(2 * time.Minute):
		return errors.New("netlink: no answer")
	}
}
