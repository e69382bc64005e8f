//go:build linux

// Command testnet runs a program on a tailnet that exists only for it: a coordination server and a relay on the loopback interface, and a
// Go node "gopeer" that other languages' tests talk to. The program gets
//
//	TS_CONTROL_URL, TS_AUTHKEY   to join (the key is reusable)
//	TAILNODE_TEST_PEER           the name of the Go node
//
// and its exit status becomes testnet's. gopeer serves, over TCP, 7: echo; 9: discard, then the count of bytes as 8 bytes, big-endian; 19: as many bytes as
// 8 bytes, big-endian, ask for; 13: reads one byte, then resets; 20: the caller's address as text; 21: reads the URL of a
// login and approves it; over UDP, 7: echo.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path"
	"time"

	"github.com/tailnode/tailnode"
	"github.com/tailnode/tailnode/coord"
	"github.com/tailnode/tailnode/relay"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: testnet PROGRAM [ARG...]")
		os.Exit(2)
	}
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "testnet:", err)
		code = 1
	}
	os.Exit(code)
}

func run(argv []string) (int, error) {
	ctx := context.Background()
	rl := &relay.Server{Addr: "127.0.0.1:0"}
	if err := rl.Start(ctx); err != nil {
		return 0, err
	}
	defer rl.Close()
	n := rl.Node()
	co := &coord.Server{Relays: []coord.Region{{ID: 900, Code: "here", Name: "this machine", Nodes: []coord.Relay{{
		Name: n.Name, HostName: n.HostName, IPv4: n.IPv4, IPv6: n.IPv6,
		DERPPort: n.DERPPort, STUNPort: n.STUNPort, CertName: n.CertName,
	}}}}}
	if err := co.Start(ctx); err != nil {
		return 0, err
	}
	defer co.Close()
	key, err := co.CreateAuthKey(coord.AuthKeyOptions{Reusable: true})
	if err != nil {
		return 0, err
	}
	peer := &tailnode.Server{Hostname: "gopeer", Store: tailnode.NewMemoryStore(), ControlURL: co.BaseURL(), AuthKey: key,
		UserLogf: func(string, ...any) {}}
	defer peer.Close()
	up, cancel := context.WithTimeout(ctx, 30*time.Second)
	_, err = peer.Up(up)
	cancel()
	if err != nil {
		return 0, err
	}
	for port, serve := range map[string]func(net.Conn){
		":7": echo, ":9": discard, ":13": reset, ":19": source, ":20": caller,
		":21": func(c net.Conn) { approve(co, c) },
	} {
		ln, err := peer.Listen("tcp", port)
		if err != nil {
			return 0, err
		}
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); serve(c) }()
			}
		}()
	}
	pc, err := peer.ListenPacket("udp", ":7")
	if err != nil {
		return 0, err
	}
	go func() {
		b := make([]byte, 65535)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(b[:n], from)
		}
	}()

	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "TS_CONTROL_URL="+co.BaseURL(), "TS_AUTHKEY="+key, "TAILNODE_TEST_PEER=gopeer")
	err = cmd.Run()
	if cmd.ProcessState == nil {
		return 0, err
	}
	if !cmd.ProcessState.Exited() {
		return 0, err // a signal
	}
	return cmd.ProcessState.ExitCode(), nil
}

func echo(c net.Conn) { io.Copy(c, c) }

func discard(c net.Conn) {
	n, _ := io.Copy(io.Discard, c)
	c.Write(binary.BigEndian.AppendUint64(nil, uint64(n)))
}

func source(c net.Conn) {
	var b [8]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return
	}
	buf := make([]byte, 128<<10)
	for left := binary.BigEndian.Uint64(b[:]); left > 0; {
		k := min(left, uint64(len(buf)))
		if _, err := c.Write(buf[:k]); err != nil {
			return
		}
		left -= k
	}
}

func reset(c net.Conn) {
	c.Read(make([]byte, 1))
	if l, ok := c.(interface{ SetLinger(int) error }); ok {
		l.SetLinger(0)
	}
}

func caller(c net.Conn) { io.WriteString(c, c.RemoteAddr().String()) }

func approve(co *coord.Server, c net.Conn) {
	url, _ := io.ReadAll(io.LimitReader(c, 4096))
	if err := co.ApproveLogin(path.Base(string(url)), coord.ApproveOptions{}); err != nil {
		io.WriteString(c, err.Error())
		return
	}
	io.WriteString(c, "ok")
}
