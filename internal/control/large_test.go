package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

// gathered decodes b with its peers one at a time, and puts them into Peers; lazy says that there was something to put.
func gathered(b []byte) (m *tailcfg.MapResponse, lazy bool, err error) {
	m, err = decodeMap(b, 0)
	if err != nil || m.EachPeer == nil {
		return m, false, err
	}
	err = m.EachPeer(func(n *tailcfg.Node) error {
		if n == nil {
			m.Peers = append(m.Peers, nil)
			return nil
		}
		j, err := json.Marshal(n) // n is not ours to keep
		if err != nil {
			return err
		}
		c := new(tailcfg.Node)
		m.Peers = append(m.Peers, c)
		return json.Unmarshal(j, c)
	})
	m.EachPeer = nil
	return m, true, err
}

// sameMap fails the test unless both ways of decoding b say the same.
func sameMap(t *testing.T, b []byte) (lazy bool) {
	t.Helper()
	want := new(tailcfg.MapResponse)
	wantErr := json.Unmarshal(b, want)
	got, lazy, err := gathered(b)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%v, and at once %v", err, wantErr)
	}
	if err != nil {
		if lazy && !errors.Is(err, ErrBadMap) {
			t.Errorf("got %v", err)
		}
		return lazy
	}
	var js [2][]byte
	for i, m := range []*tailcfg.MapResponse{got, want} {
		for _, n := range m.Peers { // what is missing one way may be empty the other
			if n != nil && n.Hostinfo == nil {
				n.Hostinfo = &tailcfg.Hostinfo{}
			}
			if n != nil && len(n.Addresses) == 0 {
				n.Addresses = nil
			}
		}
		js[i], _ = json.Marshal(m)
	}
	if !bytes.Equal(js[0], js[1]) {
		t.Errorf("got  %s\nwant %s", js[0], js[1])
	}
	return lazy
}

func TestDecodeMap(t *testing.T) {
	for _, test := range []struct {
		in   string
		lazy bool
	}{
		{`{}`, false},
		{` { } `, false},
		{`null`, false},
		{`[]`, false},
		{`{"Domain":"x"}`, false},
		{`{"Peers":null}`, false},
		{`{"Peers":[]}`, false},
		{`{"Peers": [ ] , "Domain":"x"}`, false},
		{`{"Peers":7}`, false},
		{`{"Peers":"[1]"}`, false},
		{`{"Peers":[{"ID":1}]}`, true},
		{"\t{ \"Domain\" : \"a\\\"b\\\\\" ,\n \"Peers\" : [ {\"ID\":1} ,\r\n null , { \"ID\" : 2 } ]  , \"PopBrowserURL\":\"[,]{}\" } ", true},
		{`{"Node":{"ID":9,"CapMap":{"Peers":[{"a":"]"}]}},"Peers":[{"ID":1,"Name":"a]},\"","Addresses":["100.64.0.1/32"],"Endpoints":["1.2.3.4:5","1.2.3.4:6"],"Hostinfo":{"OS":"x","Services":[{"Proto":"tcp","Port":1}]}},{"ID":2,"Endpoints":["5.6.7.8:9"]},{"ID":3,"AllowedIPs":[],"Hostinfo":null},{"ID":4,"Hostinfo":{}}]}`, true},
		{`{"Peers":[{"ID":"x"}]}`, true},
		{`{"Peers":[{"ID":1},7]}`, true},
		{`{"Peers":[[]]}`, true},
		{`{"Peers":[{"ID":1}`, false},
		{`{"Peers":[{"ID":1}],"Domain":1}`, false},
	} {
		t.Run(test.in, func(t *testing.T) {
			if lazy := sameMap(t, []byte(test.in)); lazy != test.lazy {
				t.Errorf("one at a time: %v", lazy)
			}
		})
	}
}

// A large map, and an error of the one who takes the peers.
func TestDecodeLargeMap(t *testing.T) {
	j := bigMap(500)
	if !sameMap(t, j) {
		t.Error("its peers were decoded at once")
	}
	m, err := decodeMap(j, largeMap)
	if err != nil || m.EachPeer == nil || m.Domain != "example.org" || m.Node == nil {
		t.Fatal(m, err)
	}
	stop := errors.New("enough")
	n := 0
	if err := m.EachPeer(func(*tailcfg.Node) error {
		if n++; n == 3 {
			return stop
		}
		return nil
	}); err != stop || n != 3 {
		t.Errorf("%v after %d", err, n)
	}
}

func FuzzDecodeMap(f *testing.F) {
	f.Add([]byte(`{"Domain":"a\"b","Peers":[{"ID":1,"Hostinfo":{}},null,{"ID":2}],"Node":{"CapMap":{"x":[1,"]"]}}}`))
	f.Add([]byte(`{"Peers":[],"PeersRemoved":[1]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if strings.Count(strings.ToLower(string(b)), "peers\"") > 1 || bytes.Contains(b, []byte("\\u")) {
			return // twice the same member: the package json mixes the two
		}
		sameMap(t, b)
	})
}
