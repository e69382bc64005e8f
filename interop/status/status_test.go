// Package status holds the JSON forms of our public types against upstream's: what reads
// the one reads the other.
package status

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/tailnode/tailnode"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/ipn/ipnstate"
)

// fill sets everything below v to a value that is not its zero.
func fill(t *testing.T, v reflect.Value, path string) {
	switch p := v.Addr().Interface().(type) {
	case *netip.Addr:
		*p = netip.MustParseAddr("100.64.0.1")
		return
	case *netip.Prefix:
		*p = netip.MustParsePrefix("100.64.0.1/32")
		return
	case *time.Time:
		*p = time.Unix(1_800_000_000, 0).UTC()
		return
	case *tailnode.NodePublic:
		if err := p.UnmarshalText([]byte("nodekey:0102030405060708091011121314151617181920212223242526272829303132")); err != nil {
			t.Fatal(err)
		}
		return
	case *tailnode.RawMessage:
		*p = `{"a":1}`
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString("text of " + path)
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(len(path)))
	case reflect.Uint16:
		v.SetUint(uint64(len(path)))
	case reflect.Float64:
		v.SetFloat(0.25)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), path)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(t, v.Index(0), path)
	case reflect.Map:
		k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(t, k, path)
		fill(t, e, path)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(k, e)
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).Type() == reflect.TypeFor[*tailnode.PathStatus]() {
				continue // ours alone; upstream's readers pass over it
			}
			fill(t, v.Field(i), path+"."+v.Type().Field(i).Name)
		}
	default:
		t.Fatalf("%s is a %v, which this test does not know", path, v.Type())
	}
}

func TestJSON(t *testing.T) {
	for _, c := range []struct{ ours, theirs any }{
		{new(tailnode.Status), new(ipnstate.Status)},
		{new(tailnode.PingResult), new(ipnstate.PingResult)},
		{new(tailnode.WhoIsResponse), new(apitype.WhoIsResponse)},
	} {
		t.Run(fmt.Sprintf("%T", c.ours), func(t *testing.T) {
			fill(t, reflect.ValueOf(c.ours).Elem(), "")
			ours, err := json.Marshal(c.ours)
			if err != nil {
				t.Fatal(err)
			}
			d := json.NewDecoder(bytes.NewReader(ours))
			d.DisallowUnknownFields()
			if err := d.Decode(c.theirs); err != nil {
				t.Fatalf("upstream does not read it: %v\n%s", err, ours)
			}
			theirs, err := json.Marshal(c.theirs)
			if err != nil {
				t.Fatal(err)
			}
			var o, u any
			if json.Unmarshal(ours, &o) != nil || json.Unmarshal(theirs, &u) != nil {
				t.Fatal("not JSON")
			}
			within(t, "", o, u)

			// And back: our types take upstream's text.
			again := reflect.New(reflect.TypeOf(c.ours).Elem()).Interface()
			if err := json.Unmarshal(theirs, again); err != nil {
				t.Fatalf("we do not read upstream's: %v", err)
			}
			if !reflect.DeepEqual(again, c.ours) {
				t.Errorf("after a round trip:\n got %+v\nwant %+v", again, c.ours)
			}
		})
	}
}

// within reports what of ours is not the same in theirs.
func within(t *testing.T, path string, ours, theirs any) {
	switch o := ours.(type) {
	case map[string]any:
		u, _ := theirs.(map[string]any)
		for k, v := range o {
			if _, ok := u[k]; !ok {
				t.Errorf("upstream has no %s.%s", path, k)
				continue
			}
			within(t, path+"."+k, v, u[k])
		}
	case []any:
		u, _ := theirs.([]any)
		if len(u) != len(o) {
			t.Errorf("%s: %v, upstream %v", path, ours, theirs)
			return
		}
		for i := range o {
			within(t, path, o[i], u[i])
		}
	default:
		if !reflect.DeepEqual(ours, theirs) {
			t.Errorf("%s: %v, upstream %v", path, ours, theirs)
		}
	}
}
