package coord_test

import (
	"testing"

	"github.com/tailnode/tailnode/coord"
)

// TestUpstreamJoins is the point of the whole server: two upstream nodes join with an auth key, without special
// settings, and reach each other by address and by name.
func TestUpstreamJoins(t *testing.T) {
	s := start(t, &coord.Server{Dir: t.TempDir()})
	key := authKey(t, s, coord.AuthKeyOptions{Reusable: true})
	a, b := upstream(t, s, "alpha", key), upstream(t, s, "beta", key)
	st, err := a.Up(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	if got := st.Self.DNSName; got != "alpha.tailnode.internal." {
		t.Errorf("DNSName = %q", got)
	}
	if _, err := b.Up(ctx(t)); err != nil {
		t.Fatal(err)
	}
	serveEcho(t, a, ":7")
	serveEcho(t, b, ":7")
	echo(t, b, hostPort(ip4(t, a), "7"))
	echo(t, a, hostPort(ip4(t, b), "7"))
	echo(t, a, "beta:7")
	echo(t, b, "alpha.tailnode.internal:7")
}
