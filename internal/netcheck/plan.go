package netcheck

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"sort"
	"time"

	"github.com/tailnode/tailnode/internal/tailcfg"
)

const (
	// retransmit is the distance of the probes of a region.
	retransmit = 100 * time.Millisecond
	// tries is how many probes a region gets in each family, on its nodes in turn.
	tries = 3
	// tcpAfter is how long UDP has for its first answer before TCP is tried as well.
	tcpAfter = 150 * time.Millisecond
	// historyAge is how long a latency counts as a region's best.
	historyAge = 5 * time.Minute
	// incremental is how many of the fastest regions of the last report are probed again while
	// that report is young; the home is always probed.
	incremental = 4
	// A region takes the home's place only if it is better by both.
	minGain      = 10 * time.Millisecond
	minGainRatio = 2.0 / 3
	// maxRegions bounds the regions that are probed, whatever the map holds, and maxNodes those of each.
	maxRegions = 128
	maxNodes   = 8
	// slack is the least time that other regions get after the first answer.
	slack = 10 * time.Millisecond
)

// Kind is what a probe sends.
type Kind uint8

// The kinds of probe.
const (
	STUN4   Kind = iota + 1 // a STUN request over UDP and IPv4
	STUN6                   // the same over IPv6
	TCP                     // a TCP connection, closed at once; in a full check an HTTPS request over it
	Captive                 // an HTTP request that only the relay can answer as it does
)

// Probe is one thing to send.
type Probe struct {
	Region int
	Node   *tailcfg.DERPNode
	Kind   Kind
	After  time.Duration // since the start
}

// candidates returns the regions that may be home, by ID.
func candidates(dm *tailcfg.DERPMap) []*tailcfg.DERPRegion {
	var out []*tailcfg.DERPRegion
	if dm == nil {
		return nil
	}
	for _, r := range dm.Regions {
		if r != nil && r.RegionID > 0 && !r.NoMeasureNoHome && slices.ContainsFunc(r.Nodes, func(n *tailcfg.DERPNode) bool {
			return n != nil && !n.STUNOnly
		}) {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *tailcfg.DERPRegion) int { return cmp.Compare(a.RegionID, b.RegionID) })
	return out
}

const (
	// captiveAfter is how long UDP has for its first answer before a captive portal is looked for: where UDP
	// works there is none. captiveNodes bounds the relays that are asked.
	captiveAfter = 200 * time.Millisecond
	captiveNodes = 5
)

// captivePlan returns the probes for a captive portal, of the home region first. Names are not looked up: a
// portal's own resolver may answer them.
func captivePlan(dm *tailcfg.DERPMap, home int) (plan []Probe) {
	regions := candidates(dm)
	sort.SliceStable(regions, func(i, j int) bool { return regions[i].RegionID == home && regions[j].RegionID != home })
	for _, r := range regions {
		for _, n := range r.Nodes[:min(len(r.Nodes), maxNodes)] {
			if n == nil || !n.CanPort80 || len(plan) == captiveNodes {
				continue
			}
			if a, err := netip.ParseAddr(n.IPv4); err == nil && a.Is4() {
				plan = append(plan, Probe{r.RegionID, n, Captive, captiveAfter})
			}
		}
	}
	return plan
}

// Plan returns the probes that find the home among dm's regions, in the order of their time. home is the present
// home, 0 for none. With a last report younger than a few minutes only its fastest regions and the home are probed. v4 and
// v6 say which families have a socket.
func Plan(dm *tailcfg.DERPMap, home int, last *Report, now time.Time, v4, v6 bool) []Probe {
	regions := candidates(dm)
	if last != nil && now.Sub(last.Time) < historyAge && len(last.Latency) > 0 {
		regions = fastest(regions, home, last)
	}
	if len(regions) > maxRegions {
		i := slices.IndexFunc(regions, func(r *tailcfg.DERPRegion) bool { return r.RegionID == home })
		if i >= maxRegions {
			regions[maxRegions-1] = regions[i]
		}
		regions = regions[:maxRegions]
	}
	var plan []Probe
	for _, r := range regions {
		var stun, relays []*tailcfg.DERPNode
		for _, n := range r.Nodes {
			if n == nil {
				continue
			}
			if n.STUNPort >= 0 && n.STUNPort <= math.MaxUint16 && len(stun) < maxNodes {
				stun = append(stun, n)
			}
			if !n.STUNOnly && n.DERPPort >= 0 && n.DERPPort <= math.MaxUint16 && len(relays) < maxNodes {
				relays = append(relays, n)
			}
		}
		udp := false
		for try := range tries {
			if len(stun) == 0 {
				break
			}
			n := stun[try%len(stun)]
			at := time.Duration(try) * retransmit
			if v4 && may(n, STUN4) {
				plan = append(plan, Probe{r.RegionID, n, STUN4, at})
				udp = true
			}
			if v6 && may(n, STUN6) {
				plan = append(plan, Probe{r.RegionID, n, STUN6, at})
				udp = true
			}
		}
		at := tcpAfter
		if !udp {
			at = 0 // TCP is all there is
		}
		for try := range min(2, len(relays)) {
			plan = append(plan, Probe{r.RegionID, relays[try], TCP, at + time.Duration(try)*retransmit})
		}
	}
	sort.SliceStable(plan, func(i, j int) bool { return plan[i].After < plan[j].After })
	return plan
}

// may reports whether node n may have an address of the kind's family.
func may(n *tailcfg.DERPNode, k Kind) bool {
	literal := n.IPv4
	if k == STUN6 {
		literal = n.IPv6
	}
	if n.STUNTestIP != "" {
		a, err := netip.ParseAddr(n.STUNTestIP)
		return err == nil && a.Is4() == (k == STUN4)
	}
	if literal != "" {
		a, err := netip.ParseAddr(literal)
		return err == nil && a.Is4() == (k == STUN4) // "none" does not parse
	}
	return n.HostName != ""
}

// fastest keeps the regions that a fresh last report calls fastest, and the home. A region that
// is not in that report is kept too: it may be new.
func fastest(regions []*tailcfg.DERPRegion, home int, last *Report) []*tailcfg.DERPRegion {
	byLatency := slices.Clone(regions)
	latency := func(r *tailcfg.DERPRegion) time.Duration { return last.Latency[r.RegionID] }
	sort.SliceStable(byLatency, func(i, j int) bool { return latency(byLatency[i]) < latency(byLatency[j]) })
	measured := 0
	keep := make(map[int]bool)
	for _, r := range byLatency {
		_, tried := last.tried[r.RegionID]
		switch {
		case latency(r) > 0:
			measured++
			keep[r.RegionID] = measured <= incremental
		case !tried:
			keep[r.RegionID] = true
		}
	}
	keep[home] = true
	return slices.DeleteFunc(slices.Clone(regions), func(r *tailcfg.DERPRegion) bool { return !keep[r.RegionID] })
}

// score returns the factor on a region's latency.
func score(dm *tailcfg.DERPMap, region int) float64 {
	if dm.HomeParams != nil {
		if s := dm.HomeParams.RegionScore[region]; s > 0 && !math.IsInf(s, 0) {
			return s
		}
	}
	return 1
}

func scaled(dm *tailcfg.DERPMap, region int, d time.Duration) time.Duration {
	return time.Duration(min(float64(d)*score(dm, region), float64(time.Hour)))
}

// ChooseHome returns the home region for the latencies of a new report: the region with the least scaled
// latency, where recent holds each region's best of the last minutes, so that one slow answer changes nothing. The
// present home stays unless the new one is better by 10 ms and by a third. homeAlive says that
// the present home's relay is delivering, so that a lost probe does not move the node. Without
// any latency the answer is the present home if dm still has it, else the first region, 0 if
// there is none.
func ChooseHome(dm *tailcfg.DERPMap, home int, homeAlive bool, latency, recent map[int]time.Duration) int {
	regions := candidates(dm)
	if len(regions) == 0 {
		return 0
	}
	best, bestD := 0, time.Duration(0)
	for _, r := range regions {
		d, ok := latency[r.RegionID]
		if !ok {
			continue // it must be there now
		}
		if b, ok := recent[r.RegionID]; ok && b < d {
			d = b
		}
		if d = scaled(dm, r.RegionID, d); best == 0 || d < bestD {
			best, bestD = r.RegionID, d
		}
	}
	stays := slices.ContainsFunc(regions, func(r *tailcfg.DERPRegion) bool { return r.RegionID == home })
	switch {
	case best == 0 && stays:
		return home
	case best == 0:
		for _, r := range regions {
			if !r.Avoid {
				return r.RegionID
			}
		}
		return regions[0].RegionID
	case !stays || best == home:
		return best
	}
	old, measured := latency[home]
	if !measured {
		if homeAlive {
			return home
		}
		return best
	}
	old = scaled(dm, home, old)
	if old-bestD < minGain || float64(bestD) > float64(old)*minGainRatio {
		return home
	}
	return best
}

// enough returns how long after the start an answer can still change the choice, given the
// latencies so far, of which the best scaled one is of interest: a region whose probe left at the start and has not
// answered by then is worse. 0: no answer yet, so go on.
func enough(dm *tailcfg.DERPMap, home int, latency map[int]time.Duration) time.Duration {
	if len(latency) == 0 {
		return 0
	}
	best := time.Duration(math.MaxInt64)
	for r, d := range latency {
		best = min(best, scaled(dm, r, d))
	}
	low := 1.0 // the most favoured region that is still silent
	for _, r := range candidates(dm) {
		if _, ok := latency[r.RegionID]; !ok {
			low = min(low, score(dm, r.RegionID))
		}
	}
	t := time.Duration(min(float64(best)/low, float64(time.Hour)))
	// Somewhat longer: the second best is a fallback, and two servers tell whether the mapping varies.
	t += max(slack, t/4)
	if _, ok := latency[home]; home != 0 && !ok {
		// The home stays if it is within a third or 10 ms of the best; it gets the time to show.
		t = max(t, time.Duration(float64(best)/minGainRatio/score(dm, home))+minGain+slack)
	}
	return t
}
