package wireguard

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"
)

// TestVectors gives our golden vectors to wireguard-go's own handshake and cookie code.
func TestVectors(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "testdata", "vectors", "wireguard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Sessions []map[string]any
		Cookies  []map[string]string
		Bad      []struct{ Comment, Message string }
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	unhex := func(s any) []byte {
		b, err := hex.DecodeString(s.(string))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, s := range v.Sessions {
		tun := tuntest.NewChannelTUN()
		d := device.NewDevice(tun.TUN(), &bind{l: &link{}, in: make(chan []byte)}, device.NewLogger(device.LogLevelSilent, ""))
		defer d.Close()
		if err := d.IpcSet(fmt.Sprintf("private_key=%s\npublic_key=%s\npreshared_key=%s\n",
			s["responder_private"], s["initiator_public"], s["preshared_key"])); err != nil {
			t.Fatal(err)
		}
		if err := d.Up(); err != nil {
			t.Fatal(err)
		}
		pub := device.NoisePublicKey(unhex(s["responder_public"]))
		var check device.CookieChecker
		check.Init(pub)
		accepted := func(raw []byte) bool {
			var m device.MessageInitiation
			if !check.CheckMAC1(raw) || binary.Read(bytes.NewReader(raw), binary.LittleEndian, &m) != nil {
				return false
			}
			return d.ConsumeMessageInitiation(&m) != nil
		}
		if !accepted(unhex(s["initiation"])) {
			t.Errorf("%s: wireguard-go does not accept the initiation", s["comment"])
		}
		for _, bad := range v.Bad {
			if m := unhex(bad.Message); len(m) == 148 && accepted(m) {
				t.Errorf("wireguard-go accepts %q", bad.Comment)
			}
		}
		for _, c := range v.Cookies {
			if !check.CheckMAC1(unhex(c["initiation_with_mac2"])) {
				t.Error("mac1 of the initiation with a cookie")
			}
		}
		check.Init(device.NoisePublicKey(unhex(s["initiator_public"])))
		if !check.CheckMAC1(unhex(s["response"])) {
			t.Errorf("%s: mac1 of the response", s["comment"])
		}
	}
}

// TestCookieVectors has wireguard-go's cookie generator read our reply: after it, its MAC2 for
// the same message must be ours.
func TestCookieVectors(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "testdata", "vectors", "wireguard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Sessions []struct {
			ResponderPublic string `json:"responder_public"`
		}
		Cookies []struct {
			Initiation, Reply string
			WithMAC2          string `json:"initiation_with_mac2"`
		}
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	for _, c := range v.Cookies {
		pub, _ := hex.DecodeString(v.Sessions[0].ResponderPublic)
		init, _ := hex.DecodeString(c.Initiation)
		raw, _ := hex.DecodeString(c.Reply)
		want, _ := hex.DecodeString(c.WithMAC2)
		var g device.CookieGenerator
		g.Init(device.NoisePublicKey(pub))
		g.AddMacs(init)
		var m device.MessageCookieReply
		if err := binary.Read(bytes.NewReader(raw), binary.LittleEndian, &m); err != nil {
			t.Fatal(err)
		}
		if !g.ConsumeReply(&m) {
			t.Fatal("wireguard-go does not accept the cookie reply")
		}
		g.AddMacs(init)
		if !bytes.Equal(init, want) {
			t.Errorf("wireguard-go's message with the cookie is\n%x, ours\n%x", init, want)
		}
	}
}
