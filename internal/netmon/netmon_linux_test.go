package netmon

import (
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

func TestParseRoutes(t *testing.T) {
	const head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
	row := func(dst, gw, flags, metric, mask string) string {
		return "eth0\t" + dst + "\t" + gw + "\t" + flags + "\t0\t0\t" + metric + "\t" + mask + "\t0\t0\t0\n"
	}
	const zero = "00000000"
	for _, tt := range []struct{ name, in, want string }{
		{"one", head + row(zero, "0101A8C0", "0003", "100", zero) + row("0001A8C0", zero, "0001", "100", "00FFFFFF"), "192.168.1.1"},
		{"least metric", head + row(zero, "0101A8C0", "0003", "600", zero) + row(zero, "0201A8C0", "0003", "100", zero), "192.168.1.2"},
		{"down", head + row(zero, "0101A8C0", "0002", "0", zero), ""},
		{"no gateway: point to point", head + row(zero, zero, "0001", "0", zero), ""},
		{"half of everything", head + row(zero, "0101A8C0", "0003", "0", "00000080"), ""},
		{"nonsense", head + row(zero, "x", "0003", "0", zero) + row(zero, "0101A8C0", "y", "0", zero) + row(zero, "0101A8C0", "3", "z", zero) + "a b\n\n", ""},
		{"nothing", "", ""},
	} {
		gw, ok := parseRoutes([]byte(tt.in))
		if ok != (tt.want != "") || ok && gw != netip.MustParseAddr(tt.want) {
			t.Errorf("%s: %v, %v", tt.name, gw, ok)
		}
	}
}

func FuzzParseRoutes(f *testing.F) {
	f.Add([]byte("eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if gw, ok := parseRoutes(b); ok != gw.IsValid() {
			t.Error(gw, ok)
		}
	})
}

const inNamespace = "NETMON_TEST_NAMESPACE"

func TestParseRoutes6(t *testing.T) {
	const zero = "00000000000000000000000000000000"
	line := func(dst, length, hop, metric, flags, iface string) string {
		return dst + " " + length + " " + zero + " 00 " + hop + " " + metric + " 00000001 00000000 " + flags + "     " + iface + "\n"
	}
	const ll, ula = "fe800000000000000000000000000001", "fd000000000000000000000000000001"
	own := line("20010db8000000000000000000000000", "40", zero, "00000100", "00000001", "eth0")
	for _, tt := range []struct{ name, table, want string }{
		{"none", own, ""},
		{"empty", "", ""},
		{"link-local", own + line(zero, "00", ll, "00000400", "00000003", "eth0"), "fe80::1%eth0"},
		{"unique local", line(zero, "00", ula, "00000400", "00000003", "eth0"), "fd00::1"},
		{"the least metric", line(zero, "00", ula, "00000400", "00000003", "eth0") + line(zero, "00", ll, "00000100", "00000003", "eth1"), "fe80::1%eth1"},
		{"without a gateway", line(zero, "00", zero, "00000400", "00000001", "tun0"), ""},
		{"unreachable", line(zero, "00", zero, "ffffffff", "00200200", "lo"), ""},
		{"half the Internet", line(zero, "01", ll, "00000400", "00000003", "eth0"), ""},
		{"garbage", line(zero, "00", "x", "00000400", "00000003", "eth0") + line(zero, "00", ll, "zz", "00000003", "eth0") + "\n\nx y z\n", ""},
	} {
		got := ""
		if a, ok := parseRoutes6([]byte(tt.table)); ok {
			got = a.String()
		}
		if got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

// TestNamespace changes a network of its own, in a namespace that a second run of the test is in.
func TestNamespace(t *testing.T) {
	if os.Getenv(inNamespace) != "" {
		testNamespace(t)
		return
	}
	if os.Getuid() != 0 {
		t.Skip("needs root, for a network namespace")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs the ip command, to change a network namespace")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestNamespace$", "-test.v", "-test.timeout=10m")
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.Process == nil {
		t.Skipf("no network namespace here: %v", err)
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func testNamespace(t *testing.T) {
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v\n%s", args, err, out)
		}
	}
	if _, err := DefaultGateway(); err != ErrNoGateway {
		t.Errorf("a gateway in an empty namespace: %v", err)
	}
	ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
	changes := make(chan Change, 100)
	m, err := New(Config{OnChange: func(c Change) { changes <- c }, Interval: time.Hour}) // nothing is found by polling
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if !m.watched {
		t.Fatal("no netlink")
	}
	await := func(what string, ok func(Change) bool) {
		t.Helper()
		timeout := time.After(time.Minute)
		for {
			select {
			case c := <-changes:
				if ok(c) {
					return
				}
			case <-timeout:
				t.Fatalf("%s: no change; now %+v", what, m.State())
			}
		}
	}
	addr, other, gw := netip.MustParseAddr("192.168.77.2"), netip.MustParseAddr("192.168.78.2"), netip.MustParseAddr("192.168.77.1")
	has := func(want netip.Addr) func(Change) bool {
		return func(c Change) bool { return c.New.Default4 == want }
	}
	ip("link", "set", "v1", "up")
	ip("addr", "add", "192.168.77.2/24", "dev", "v0")
	ip("link", "set", "v0", "up")
	await("address", func(c Change) bool { return len(c.New.Addrs) == 1 && c.New.Addrs[0] == addr })
	ip("route", "add", "default", "via", "192.168.77.1", "metric", "200")
	await("default route", func(c Change) bool {
		return c.New.Default4 == addr && c.New.DefaultInterface == "v0"
	})
	if g, err := DefaultGateway(); err != nil || g.Gateway != gw || g.Self != addr {
		t.Errorf("gateway %+v, %v", g, err)
	}
	ip("addr", "add", "192.168.78.2/24", "dev", "v1")
	ip("route", "add", "default", "via", "192.168.78.1", "metric", "100")
	await("a better way", func(c Change) bool { return c.New.Default4 == other && c.New.DefaultInterface == "v1" && c.Major })
	ip("link", "set", "v1", "down")
	await("a link down: the other way", has(addr))
	ip("link", "set", "v0", "down")
	await("all links down", has(netip.Addr{}))
	m.Close()
}
