package matrix

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailnode/tailnode/interop/harness"
)

// both runs a check in the two directions.
func both(t *testing.T, e *env, f func(t *testing.T, from, to *node)) {
	t.Helper()
	t.Run("a-to-b", func(t *testing.T) { f(t, e.a, e.b) })
	t.Run("b-to-a", func(t *testing.T) { f(t, e.b, e.a) })
}

// serve accepts connections until the test ends and runs f on each.
func serve(t *testing.T, n *node, addr string, f func(net.Conn)) {
	t.Helper()
	ln, err := n.Listen("tcp", addr)
	if err != nil {
		t.Fatalf("%s: Listen(%s): %v", n.name, addr, err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				f(c)
			}()
		}
	}()
}

func echo(c net.Conn) { io.Copy(c, c) }

// dial dials, and hands a deadline on to the connection.
func dial(t *testing.T, ctx context.Context, n *node, network, addr string) net.Conn {
	t.Helper()
	c, err := n.Dial(ctx, network, addr)
	if err != nil {
		t.Fatalf("%s: Dial(%s, %s): %v", n.name, network, addr, err)
	}
	t.Cleanup(func() { c.Close() })
	if d, ok := ctx.Deadline(); ok {
		c.SetDeadline(d)
	}
	return c
}

// says sends a line and wants it back.
func says(t *testing.T, c net.Conn, line string) {
	t.Helper()
	if _, err := io.WriteString(c, line); err != nil {
		t.Fatalf("write: %v", err)
	}
	got := make([]byte, len(line))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("read: %v", err)
	}
	if string(got) != line {
		t.Fatalf("got %q, want %q", got, line)
	}
}

func hostport(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }

func checkTCP(t *testing.T, ctx context.Context, e *env) {
	both(t, e, func(t *testing.T, from, to *node) {
		serve(t, to, ":7", echo)
		v4, v6 := to.Addrs()
		for _, a := range []netip.Addr{v4, v6} {
			c := dial(t, ctx, from, "tcp", hostport(a, 7))
			says(t, c, "over "+a.String())
			// Half-close: the other side reads the end, and what it sends afterwards still arrives.
			if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Fatalf("CloseWrite: %v", err)
			}
			if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
				t.Fatalf("after CloseWrite: read %q, %v; want the end", rest, err)
			}
		}
		// A port on which nobody listens is refused, and not only when the context ends.
		began := time.Now()
		quick, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if c, err := from.Dial(quick, "tcp", hostport(v4, 9)); err == nil {
			c.Close()
			t.Error("Dial to a port without a listener succeeded")
		} else if quick.Err() != nil {
			t.Errorf("Dial to a port without a listener took %v: %v", time.Since(began), err)
		}
	})
}

func checkUDP(t *testing.T, ctx context.Context, e *env) {
	both(t, e, func(t *testing.T, from, to *node) {
		v4, v6 := to.Addrs()
		for _, a := range []netip.Addr{v4, v6} {
			pc, err := to.ListenPacket("udp", hostport(a, 7))
			if err != nil {
				t.Fatalf("%s: ListenPacket: %v", to.name, err)
			}
			defer pc.Close()
			go func() {
				buf := make([]byte, 65536)
				for {
					n, src, err := pc.ReadFrom(buf)
					if err != nil {
						return
					}
					pc.WriteTo(buf[:n], src)
				}
			}()
			c := dial(t, ctx, from, "udp", hostport(a, 7))
			for _, size := range []int{1, 512, 1200} {
				want := bytes.Repeat([]byte{byte(size)}, size)
				if err := ask(ctx, c, want); err != nil {
					t.Errorf("%d bytes to %v: %v", size, a, err)
				}
			}
		}
	})
}

// ask sends a datagram until the same comes back: a relay may drop.
func ask(ctx context.Context, c net.Conn, want []byte) error {
	buf := make([]byte, 65536)
	for ctx.Err() == nil {
		if _, err := c.Write(want); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		for {
			n, err := c.Read(buf)
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				break
			}
			if err != nil {
				return err
			}
			if bytes.Equal(buf[:n], want) {
				return nil
			}
			// The answer to an earlier copy; keep reading.
		}
	}
	return ctx.Err()
}

func checkNames(t *testing.T, ctx context.Context, e *env) {
	both(t, e, func(t *testing.T, from, to *node) {
		serve(t, to, ":80", echo)
		full := to.status(t, ctx).Name
		for _, host := range []string{to.name, strings.TrimSuffix(full, "."), full, strings.ToUpper(to.name)} {
			c := dial(t, ctx, from, "tcp", net.JoinHostPort(host, "80"))
			says(t, c, host)
			c.Close()
		}
	})
}

func checkWhoIs(t *testing.T, ctx context.Context, e *env) {
	both(t, e, func(t *testing.T, from, to *node) {
		seen := make(chan string, 1)
		serve(t, to, ":113", func(c net.Conn) {
			seen <- c.RemoteAddr().String()
			echo(c)
		})
		v4, _ := to.Addrs()
		c := dial(t, ctx, from, "tcp", hostport(v4, 113))
		says(t, c, "who am I?")
		check := func(asked, about *node, remote string) {
			t.Helper()
			who, err := asked.WhoIs(ctx, remote)
			if err != nil {
				t.Fatalf("%s: WhoIs(%s): %v", asked.name, remote, err)
			}
			st := about.status(t, ctx)
			a4, a6 := about.Addrs()
			if who.Name != st.Name || who.Login == "" || !slices.Contains(who.Addrs, a4) || !slices.Contains(who.Addrs, a6) {
				t.Errorf("%s: WhoIs(%s) = %+v; want %s with %v and %v", asked.name, remote, who, st.Name, a4, a6)
			}
		}
		check(to, from, <-seen)
		check(from, to, c.RemoteAddr().String())
	})
}

// send writes n pseudo-random bytes and returns their digest, and pace is told how many are written.
func send(w io.Writer, n int, pace func(sent int)) ([]byte, error) {
	var seed [32]byte
	seed[0] = byte(n)
	src := rand.NewChaCha8(seed)
	sum := sha256.New()
	buf := make([]byte, 64<<10)
	for sent := 0; sent < n; {
		b := buf[:min(len(buf), n-sent)]
		src.Read(b)
		sum.Write(b)
		if _, err := w.Write(b); err != nil {
			return nil, fmt.Errorf("after %d bytes: %w", sent, err)
		}
		sent += len(b)
		if pace != nil {
			pace(sent)
		}
	}
	return sum.Sum(nil), nil
}

// digest reads to the end of the stream and answers with the digest of what it read.
func digest(c net.Conn) {
	sum := sha256.New()
	if _, err := io.Copy(sum, c); err == nil {
		c.Write(sum.Sum(nil))
	}
}

// upload sends n bytes to a digest server and compares.
func upload(c net.Conn, n int, pace func(sent int)) error {
	want, err := send(c, n, pace)
	if err != nil {
		return err
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("the other side received %x, sent was %x", got, want)
	}
	return nil
}

func checkBulk(t *testing.T, ctx context.Context, e *env) {
	both(t, e, func(t *testing.T, from, to *node) {
		serve(t, to, ":9000", digest)
		v4, _ := to.Addrs()
		began := time.Now()
		if err := upload(dial(t, ctx, from, "tcp", hostport(v4, 9000)), size(), nil); err != nil {
			t.Fatal(err)
		}
		took := time.Since(began)
		t.Logf("%d MiB in %v, %.0f Mbit/s", size()>>20, took.Round(time.Millisecond), float64(size())*8/1e6/took.Seconds())
	})
}

func checkRelayRestart(t *testing.T, ctx context.Context, e *env) {
	serve(t, e.b, ":9000", digest)
	v4, _ := e.b.Addrs()
	c := dial(t, ctx, e.a, "tcp", hostport(v4, 9000))
	total := size() / 4
	restarted := false
	err := upload(c, total, func(sent int) {
		if restarted || sent < total/2 {
			return
		}
		restarted = true
		if err := e.relay.Stop(); err != nil {
			t.Errorf("stop relay: %v", err)
		}
		if err := e.relay.Start(); err != nil {
			t.Errorf("start relay: %v", err)
		}
	})
	if err != nil {
		t.Fatalf("transfer over a restart of the relay: %v", err)
	}
}

func checkReturn(t *testing.T, ctx context.Context, e *env) {
	before := e.b.status(t, ctx)
	v4, v6 := e.b.Addrs()
	if err := e.b.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	if e.cell.control.online {
		if err := e.a.online(ctx, e.b.name, false); err != nil {
			t.Error(err)
		}
	}
	e.b.remake(t)
	e.up(t, ctx, e.a, e.b)
	if got4, got6 := e.b.Addrs(); got4 != v4 || got6 != v6 {
		t.Errorf("came back with %v and %v, had %v and %v", got4, got6, v4, v6)
	}
	if after := e.b.status(t, ctx); after.Key != before.Key || after.Name != before.Name {
		t.Errorf("came back as %s %s, was %s %s", after.Name, after.Key, before.Name, before.Key)
	}
	both(t, e, func(t *testing.T, from, to *node) {
		serve(t, to, ":7", echo)
		v4, _ := to.Addrs()
		began := time.Now()
		says(t, dial(t, ctx, from, "tcp", hostport(v4, 7)), "back")
		t.Logf("first answer after %v", time.Since(began).Round(time.Millisecond))
	})
}

func (n *node) online(ctx context.Context, peer string, want bool) error {
	return harness.Until(ctx, fmt.Sprintf("%s to see %s online: %v", n.name, peer, want), func() (bool, error) {
		st, err := n.Status(ctx)
		if err != nil {
			return false, err
		}
		p, ok := st.Peers[peer]
		return ok && p.Online == want, nil
	})
}

func checkControlRestart(t *testing.T, ctx context.Context, e *env) {
	serve(t, e.b, ":7", echo)
	v4, _ := e.b.Addrs()
	c := dial(t, ctx, e.a, "tcp", hostport(v4, 7))
	says(t, c, "before")
	if err := e.control.Stop(); err != nil {
		t.Fatal(err)
	}
	says(t, c, "an open connection without control")
	says(t, dial(t, ctx, e.a, "tcp", hostport(v4, 7)), "a new connection without control")
	if err := e.control.Start(); err != nil {
		t.Fatal(err)
	}
	says(t, c, "after")
	// That a new node comes into both views proves that both have their map stream again.
	third := e.newNode(t, e.cell.b.make, "charlie", false)
	e.up(t, ctx, e.a, e.b, third)
	serve(t, third, ":7", echo)
	t4, _ := third.Addrs()
	says(t, dial(t, ctx, e.a, "tcp", hostport(t4, 7)), "to the new node")
	if err := third.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func checkEphemeral(t *testing.T, ctx context.Context, e *env) {
	// Both guests join before either goes: once testcontrol has been made to send a removal, it
	// tells the others nothing more of its own.
	guests := []*node{
		e.newNode(t, e.cell.a.make, "guest-a", true),
		e.newNode(t, e.cell.b.make, "guest-b", true),
	}
	e.up(t, ctx, e.a, e.b, guests[0], guests[1])
	for _, guest := range guests {
		serve(t, guest, ":7", echo)
		v4, _ := guest.Addrs()
		for _, n := range []*node{e.a, e.b} {
			says(t, dial(t, ctx, n, "tcp", hostport(v4, 7)), "hello")
		}
	}
	for _, guest := range guests {
		nodeKey := guest.status(t, ctx).Key
		if err := guest.Close(); err != nil {
			t.Fatalf("Close: %v", err)
		}
		if err := e.control.Gone(ctx, nodeKey); err != nil {
			t.Fatal(err)
		}
		for _, n := range []*node{e.a, e.b} {
			n.sees(t, ctx, guest.name, false)
		}
	}
}

func checkFilter(t *testing.T, ctx context.Context, e *env) {
	both(t, e, func(t *testing.T, from, to *node) {
		open, closed := uint16(8001), uint16(8002)
		serve(t, to, fmt.Sprint(":", open), echo)
		serve(t, to, fmt.Sprint(":", closed), echo)
		v4, v6 := to.Addrs()
		says(t, dial(t, ctx, from, "tcp", hostport(v4, closed)), "not yet filtered")
		if err := e.control.AllowPorts(ctx, to.status(t, ctx).Key, open); err != nil {
			t.Fatal(err)
		}
		refused := func(a netip.Addr) (bool, error) {
			quick, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			c, err := from.Dial(quick, "tcp", hostport(a, closed))
			if err != nil {
				return true, nil
			}
			c.Close()
			return false, errors.New("it still answers")
		}
		for _, a := range []netip.Addr{v4, v6} {
			if err := harness.Until(ctx, "the filter to close a port", func() (bool, error) { return refused(a) }); err != nil {
				t.Fatal(err)
			}
			says(t, dial(t, ctx, from, "tcp", hostport(a, open)), "still open")
		}
	})
}

func checkLogin(t *testing.T, ctx context.Context, e *env) {
	if err := e.control.Interactive(true); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{e.a, e.b} {
		n.conf.AuthKey = ""
		n.remake(t)
		up := make(chan error, 1)
		go func() { up <- n.Up(ctx) }()
		if err := e.approve(ctx, n); err != nil {
			t.Fatal(err)
		}
		if err := <-up; err != nil {
			t.Fatalf("%s: Up after the login: %v", n.name, err)
		}
	}
	both(t, e, func(t *testing.T, from, to *node) {
		from.sees(t, ctx, to.name, true)
		serve(t, to, ":7", echo)
		v4, _ := to.Addrs()
		says(t, dial(t, ctx, from, "tcp", hostport(v4, 7)), "logged in")

		before := from.status(t, ctx)
		was4, was6 := from.Addrs()
		if err := e.control.Expire(ctx, before.Key); err != nil {
			t.Fatal(err)
		}
		if err := from.in(ctx, "NeedsLogin"); err != nil {
			t.Fatal(err)
		}
		if err := from.Login(ctx); err != nil {
			t.Fatalf("Login: %v", err)
		}
		if err := e.approve(ctx, from); err != nil {
			t.Fatal(err)
		}
		if err := from.in(ctx, "Running"); err != nil {
			t.Fatal(err)
		}
		after := from.status(t, ctx)
		if after.Key == before.Key {
			t.Error("the node key is the one that expired")
		}
		if got4, got6 := from.Addrs(); got4 != was4 || got6 != was6 {
			t.Errorf("has %v and %v after the login, had %v and %v", got4, got6, was4, was6)
		}
		// The peer must have learnt the new key before it can answer.
		err := harness.Until(ctx, to.name+" to learn the new key", func() (bool, error) {
			st, err := to.Status(ctx)
			return err == nil && st.Peers[from.name].Key == after.Key, err
		})
		if err != nil {
			t.Fatal(err)
		}
		says(t, dial(t, ctx, from, "tcp", hostport(v4, 7)), "logged in again")
	})
}

// in waits until a node is in a state.
func (n *node) in(ctx context.Context, state string) error {
	return harness.Until(ctx, fmt.Sprintf("%s to be in state %s", n.name, state), func() (bool, error) {
		st, err := n.Status(ctx)
		if err == nil && st.State != state {
			err = fmt.Errorf("it is in %s", st.State)
		}
		return err == nil, err
	})
}

// approve waits until a node shows its login URL, and visits that.
func (e *env) approve(ctx context.Context, n *node) error {
	return harness.Until(ctx, n.name+" to show a login URL", func() (bool, error) {
		st, err := n.Status(ctx)
		if err != nil || st.AuthURL == "" {
			return false, err
		}
		return true, e.control.Approve(ctx, st.AuthURL)
	})
}
