package main

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// A measure is one way to look at both sides. A round of it runs one side (or all at once, where each only waits) and adds values to
// rows of the table.
type measure struct {
	name  string // for -only
	what  string // in a line, for -list
	who   who
	count [2]int           // rounds: full, quick
	limit [2]time.Duration // for one round; when it is over the round's processes are killed and the round counts as failed
	run   func(r *round) error
}

// who takes part in a measure.
type who uint8

const (
	eachSide who = iota // ours and upstream, one after the other, in turns
	together            // all sides in one round, upstream at its leanest as well
	alone               // no node: the round brings its own parts for both sides
)

// measures is the list of what is measured, in this order. Rows of the table come in the order in which they were first added.
var measures = []*measure{
	{"size", "binary size and packages of a minimal program", together, [2]int{1, 1}, [2]time.Duration{10 * time.Minute, 10 * time.Minute}, measureSize},
	{"start", "start to Up, to the first byte from a peer, to a direct path", eachSide, [2]int{7, 2}, secs(20, 20), measureStart},
	{"start-1000", "the same with 1,000 peers in the netmap", eachSide, [2]int{3, 1}, secs(30, 20), startMany(1000)},
	{"start-10000", "the same with 10,000 peers in the netmap", eachSide, [2]int{3, 1}, secs(45, 30), startMany(10_000)},
	{"blocked", "the same with all UDP dropped", eachSide, [2]int{3, 1}, secs(40, 30), measureBlocked},
	{"restart", "restart of each of two nodes to the first byte", eachSide, [2]int{4, 1}, secs(40, 30), measureRestart},
	{"idle", "memory, threads, goroutines, processor time at 1, 1,000, 10,000 peers, doing nothing", together, [2]int{1, 1}, secs(150, 90), measureIdle},
	{"delta", "a change that arrives at a node with 10,000 peers", eachSide, [2]int{2, 1}, secs(60, 40), measureDelta},
	{"direct", "direct path: round trips idle and under load, TCP with 1, 8, 64 streams", eachSide, [2]int{3, 1}, secs(60, 40), measureDirect},
	{"ethernet", "the same as direct on links of 1,500 bytes", eachSide, [2]int{2, 1}, secs(60, 40), measureEthernet},
	{"limit", "what the cipher and the kernel take of a direct path, without a node", alone, [2]int{3, 1}, secs(40, 20), measureLimit},
	{"udp", "datagrams a second, direct", eachSide, [2]int{3, 1}, secs(30, 20), measureUDP},
	{"relayed", "the same as direct by our relay and by upstream's", eachSide, [2]int{2, 1}, secs(90, 60), measureRelayed},
	{"connections", "connections a second, one at a time and 32 at once", eachSide, [2]int{3, 1}, secs(30, 20), measureConnections},
	{"after", "memory 60 s after 8 streams", together, [2]int{1, 1}, secs(150, 40), measureAfter},
	{"close", "Close with thousands of connections, and what it gives back", eachSide, [2]int{2, 1}, secs(90, 45), measureClose},
	{"relay", "packets forwarded by either relay between either side's relay clients, without nodes", alone, [2]int{2, 1}, secs(40, 20), measureRelay},
	{"coord", "light nodes that join our coordination server and upstream's test server, and a change that reaches all", alone, [2]int{1, 1}, secs(100, 45), measureCoord},
	{"faces", "the C library and the Rust crate beside Go in process; needs them built", alone, [2]int{3, 1}, secs(90, 70), measureFaces},
}

func secs(full, quick int) [2]time.Duration {
	return [2]time.Duration{time.Duration(full) * time.Second, time.Duration(quick) * time.Second}
}

// plan is how much is done in a round.
type plan struct {
	quick    bool
	idle     time.Duration // of idling
	stream   time.Duration // each transfer
	after    time.Duration // from the end of the last transfer until memory is looked at again
	trips    int           // round trips, and
	tripping time.Duration // for no longer
	deltas   int           // changes of a netmap, one after the other
	hold     int           // connections open at a Close
	close    time.Duration // that a Close may take
	crowd    int           // nodes that join a coordination server
	patience patience      // with others' use of the machine, in all
	quiet    time.Duration // and before each measurement
}

var plans = [2]plan{
	{
		idle: 30 * time.Second, stream: 2500 * time.Millisecond, after: 60 * time.Second, trips: 5000, tripping: 2 * time.Second,
		deltas: 20, hold: 5000, close: 10 * time.Second, crowd: 1000, patience: patience(30 * time.Second), quiet: 3 * time.Second,
	}, {
		quick: true,
		idle:  5 * time.Second, stream: time.Second, after: 5 * time.Second, trips: 1000, tripping: time.Second,
		deltas: 5, hold: 1000, close: 3 * time.Second, crowd: 200, patience: patience(5 * time.Second), quiet: time.Second,
	},
}

// round is one run of a measure: what it started, and what it found.
type round struct {
	m     *measure
	p     *plan
	n     int   // from 0
	side  *side // nil unless the measure is for eachSide
	sides []*side

	mu     sync.Mutex
	procs  []*proc
	closed bool // its time is over: nothing more is started
	values []value
	cells  []failure
}

type value struct {
	row  row
	side string
	v    float64
}

// row says what a value is.
type row struct {
	name, unit string
	more       bool    // more is better
	goal       float64 // a ratio to upstream to be reached, or 0
	bound      float64 // a value to be reached, or 0
	chart      bool    // in the chart; a row with a goal is there anyway
}

func less(name, unit string, goal float64) row { return row{name: name, unit: unit, goal: goal} }
func more(name, unit string, goal float64) row {
	return row{name: name, unit: unit, more: true, goal: goal}
}

// within gives a row a value to be reached.
func (w row) within(bound float64) row {
	w.bound, w.chart = bound, true
	return w
}

// charted puts a row without a goal into the chart.
func (w row) charted() row {
	w.chart = true
	return w
}

// add notes a value of the round's side.
func (r *round) add(w row, v float64) { r.addTo(r.side, w, v) }

func (r *round) addTo(s *side, w row, v float64) { r.addAs(s.name, w, v) }

func (r *round) addAs(side string, w row, v float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed { // what its processes were killed in the middle of
		return
	}
	r.values = append(r.values, value{w, side, v})
}

// fail notes why a side could not be measured, where the round goes on with others.
func (r *round) fail(side string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cells = append(r.cells, failure{Measure: r.m.name, Side: side, Round: r.n + 1, Reason: reason(err)})
}

// started keeps account of a process, so that the end of the round's time ends it.
func (r *round) started(p *proc) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		p.cmd.Process.Kill()
		p.cmd.Wait()
		return errLate
	}
	r.procs = append(r.procs, p)
	return nil
}

func (r *round) ended(p *proc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.procs = slices.DeleteFunc(r.procs, func(q *proc) bool { return q == p })
}

// kill ends the round by force.
func (r *round) kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	for _, p := range r.procs {
		p.cmd.Process.Kill()
	}
}

// do runs the round for no longer than its limit. What it has found until a failure stays.
func (r *round) do() error {
	limit := r.m.limit[r.p.index()]
	done := make(chan error, 1)
	go func() { done <- r.run() }()
	late := time.NewTimer(limit)
	defer late.Stop()
	select {
	case err := <-done:
		r.kill() // what it has left behind
		return err
	case <-late.C:
	}
	r.kill()
	err := fmt.Errorf("not done in %v", limit)
	select {
	case <-done:
	case <-time.After(10 * time.Second): // it waits for something of this process: let it be
	}
	return err
}

func (r *round) run() (err error) {
	defer func() {
		if p := recover(); p != nil { // of upstream's test servers, say; the other rows are still wanted
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return r.m.run(r)
}

func (p *plan) index() int {
	if p.quick {
		return 1
	}
	return 0
}
