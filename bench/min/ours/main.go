// Command ours is the least that a program does with a node: join, and serve one connection.
// Its twin in ../upstream differs in the import alone; the benchmark compares what they weigh.
package main

import (
	"io"
	"log"

	"github.com/tailnode/tailnode"
)

func main() {
	srv := &tailnode.Server{Hostname: "minimal"}
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
