// Command upstream is the least that a program does with a node: join, and serve one connection.
// Its twin in ../ours differs in the import alone; the benchmark compares what they weigh.
package main

import (
	"io"
	"log"

	"tailscale.com/tsnet"
)

func main() {
	srv := &tsnet.Server{Hostname: "minimal"}
	defer srv.Close()
	ln, err := srv.Listen("tcp", ":80")
	if err != nil {
		log.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		log.Fatal(err)
	}
	io.WriteString(c, "hello\n")
	c.Close()
}
