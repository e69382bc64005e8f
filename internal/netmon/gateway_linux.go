package netmon

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net/netip"
	"os"
	"strconv"
)

// maxRoutes bounds what is read of the routing table, whose default routes come first.
const maxRoutes = 64 << 10

func defaultGateway4() (netip.Addr, error) { return gatewayOf("/proc/net/route", parseRoutes) }

func defaultGateway6() (netip.Addr, error) { return gatewayOf("/proc/net/ipv6_route", parseRoutes6) }

func gatewayOf(file string, parse func([]byte) (netip.Addr, bool)) (netip.Addr, error) {
	f, err := os.Open(file)
	if err != nil {
		return netip.Addr{}, ErrNoGateway // Android keeps it to itself
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRoutes))
	if err != nil {
		return netip.Addr{}, err
	}
	gw, ok := parse(b)
	if !ok {
		return netip.Addr{}, ErrNoGateway
	}
	return gw, nil
}

// parseRoutes6 does for the form of /proc/net/ipv6_route what parseRoutes does for IPv4's. It has no heading:
//
//	Destination PrefixLen Source PrefixLen NextHop Metric RefCnt Use Flags Iface
//
// all of it hexadecimal, addresses in the order of the network.
func parseRoutes6(b []byte) (best netip.Addr, ok bool) {
	const up, gateway = 1, 2 // RTF_UP, RTF_GATEWAY
	least := uint64(1 << 32)
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 10 || string(f[1]) != "00" || string(f[3]) != "00" || len(f[4]) != 32 {
			continue
		}
		var a [16]byte
		_, err1 := hex.Decode(a[:], f[4])
		metric, err2 := strconv.ParseUint(string(f[5]), 16, 32)
		flags, err3 := strconv.ParseUint(string(f[8]), 16, 32)
		if err1 != nil || err2 != nil || err3 != nil || flags&(up|gateway) != up|gateway || metric >= least {
			continue
		}
		gw := netip.AddrFrom16(a)
		if gw.IsLinkLocalUnicast() {
			gw = gw.WithZone(string(f[9]))
		}
		least, best, ok = metric, gw, true
	}
	return best, ok
}

// parseRoutes returns the gateway of the default route with the least metric in the form of /proc/net/route: a heading, then
//
//	Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
//
// with addresses as the hexadecimal of a number in the machine's order.
func parseRoutes(b []byte) (best netip.Addr, ok bool) {
	const up, gateway = 1, 2 // RTF_UP, RTF_GATEWAY
	least := uint64(1 << 32)
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 8 || string(f[1]) != "00000000" || string(f[7]) != "00000000" {
			continue
		}
		flags, err1 := strconv.ParseUint(string(f[3]), 16, 32)
		metric, err2 := strconv.ParseUint(string(f[6]), 10, 32)
		addr, err3 := strconv.ParseUint(string(f[2]), 16, 32)
		if err1 != nil || err2 != nil || err3 != nil || flags&(up|gateway) != up|gateway || metric >= least {
			continue
		}
		var a [4]byte
		binary.NativeEndian.PutUint32(a[:], uint32(addr))
		least, best, ok = metric, netip.AddrFrom4(a), true
	}
	return best, ok
}
