package main

import (
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/tailnode/tailnode/bench/child"
	"github.com/tailnode/tailnode/internal/udp"
)

// What no node can do without on a direct path: WireGuard's cipher, and the kernel's UDP with segmentation offload. What ours takes beyond
// that is TCP, checksums, copies and wake-ups.

// measureLimit takes both apart from a node, with packets as they go over links of 1,500 bytes and over loopback.
func measureLimit(r *round) error {
	for _, n := range []int{1280, 8940} {
		c, err := cipherCost(n, r.p.stream)
		if err != nil {
			return err
		}
		k, err := kernelCost(n+32, r.p.stream)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("limit of direct paths, packets of %d bytes: ", n)
		r.addAs(ours, less(name+"cipher, both ends", "s/GB", 0), c)
		r.addAs(ours, less(name+"kernel, both ends", "s/GB", 0), k)
		r.addAs(ours, less(name+"both", "s/GB", 0), c+k)
	}
	return nil
}

// cipherCost returns the processor time for a gigabyte that is sealed and opened in packets of n bytes, in place.
func cipherCost(n int, d time.Duration) (float64, error) {
	aead, err := chacha20poly1305.New(make([]byte, chacha20poly1305.KeySize))
	if err != nil {
		return 0, err
	}
	var nonce [chacha20poly1305.NonceSize]byte
	b := make([]byte, n, n+aead.Overhead())
	total := 0
	began := child.CPU()
	for end := time.Now().Add(d); time.Now().Before(end); {
		for range 100 {
			sealed := aead.Seal(b[:0], nonce[:], b, nil)
			if _, err := aead.Open(sealed[:0], nonce[:], sealed, nil); err != nil {
				return 0, err
			}
			total += n
		}
	}
	return (child.CPU() - began) / (float64(total) / 1e9), nil
}

// kernelCost returns the processor time for a gigabyte that goes from one socket to another in datagrams of n bytes, as many in a
// call as a node has.
func kernelCost(n int, d time.Duration) (float64, error) {
	const ahead = 1 << 20 // bytes under way: less than the receiver's buffer
	a, err := udp.Open(udp.Config{})
	if err != nil {
		return 0, err
	}
	defer a.Close()
	b, err := udp.Open(udp.Config{})
	if err != nil {
		return 0, err
	}
	defer b.Close()

	var mu sync.Mutex
	cond := sync.NewCond(&mu)
	got, lost := 0, false
	b.Start(func(_ int, _ netip.AddrPort, p []byte, _ int) {
		mu.Lock()
		got += len(p)
		mu.Unlock()
		cond.Signal()
	})
	port, _ := b.Ports()
	dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	batch := make([]byte, 61<<10/n*n)
	sent := 0
	began := child.CPU()
	giveUp := time.AfterFunc(d+5*time.Second, func() {
		mu.Lock()
		lost = true
		mu.Unlock()
		cond.Signal()
	})
	defer giveUp.Stop()
	for end := time.Now().Add(d); time.Now().Before(end); {
		if err := a.Send(dst, batch, n); err != nil {
			return 0, err
		}
		sent += len(batch)
		mu.Lock()
		for sent-got > ahead && !lost {
			cond.Wait()
		}
		stop := lost
		mu.Unlock()
		if stop {
			return 0, fmt.Errorf("%d of %d bytes were lost on the way between two sockets", sent-got, sent)
		}
	}
	used := child.CPU() - began
	mu.Lock()
	defer mu.Unlock()
	return used / (float64(got) / 1e9), nil
}
