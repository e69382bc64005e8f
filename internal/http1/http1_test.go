package http1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"
)

func reader(s string) *bufio.Reader { return bufio.NewReaderSize(strings.NewReader(s), 16) }

func TestReadResponse(t *testing.T) {
	long := strings.Repeat("x", 9000)
	for _, test := range []struct {
		name, method, in string
		status           int
		body, rest       string
		keep             bool
		bodyErr          error
	}{
		{"counted", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhellomore", 200, "hello", "more", true, nil},
		{"none", "GET", "HTTP/1.1 204 No Content\r\n\r\nmore", 204, "", "more", true, nil},
		{"empty", "GET", "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\nmore", 404, "", "more", true, nil},
		{"HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nmore", 200, "", "more", true, nil},
		{"switch", "POST", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nmore", 101, "", "more", true, nil},
		{"CONNECT", "CONNECT", "HTTP/1.1 200 Connection established\r\n\r\nmore", 200, "", "more", true, nil},
		{"CONNECT refused", "CONNECT", "HTTP/1.1 407 No\r\nContent-Length: 2\r\n\r\nnomore", 407, "no", "more", true, nil},
		{"to the end", "GET", "HTTP/1.1 200 OK\r\n\r\nhello", 200, "hello", "", false, nil},
		{"close", "GET", "HTTP/1.1 200 OK\r\nConnection: foo, Close\r\nContent-Length: 1\r\n\r\nx", 200, "x", "", false, nil},
		{"1.0", "GET", "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", 200, "x", "", false, nil},
		{"no reason", "GET", "HTTP/1.1 200\r\nContent-Length: 1\r\n\r\nx", 200, "x", "", true, nil},
		{"bare LF", "GET", "HTTP/1.1 200 OK\nContent-Length: 1\n\nx", 200, "x", "", true, nil},
		{"interim", "GET", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", 200, "x", "", true, nil},
		{"chunked", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n3;a=b\r\nhel\r\n2 \r\nlo\r\n0\r\nT: t\r\n\r\nmore", 200, "hello", "more", true, nil},
		{"folded", "GET", "HTTP/1.1 200 OK\r\nA: b\r\n  c\r\nContent-Length: 1\r\n\r\nx", 200, "x", "", true, nil},
		{"long line", "GET", "HTTP/1.1 200 OK\r\nA: " + long + "\r\nContent-Length: 1\r\n\r\nx", 200, "x", "", true, nil},
		{"cut body", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", 200, "hel", "", true, io.ErrUnexpectedEOF},
		{"cut chunk", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", 200, "hel", "", true, io.ErrUnexpectedEOF},
		{"cut after chunk", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel", 200, "hel", "", true, io.ErrUnexpectedEOF},
		{"cut trailer", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", 200, "", "", true, io.ErrUnexpectedEOF},
		{"bad chunk", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-3\r\nhel\r\n", 200, "", "hel\r\n", true, ErrMalformed},
		{"chunk too long", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhel\r\n0\r\n\r\n", 200, "he", "0\r\n\r\n", true, ErrMalformed},
	} {
		t.Run(test.name, func(t *testing.T) {
			br := reader(test.in)
			r, err := ReadResponse(br, test.method)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(r.Body)
			if !errors.Is(err, test.bodyErr) || err != nil && test.bodyErr == nil {
				t.Errorf("body: error %v, want %v", err, test.bodyErr)
			}
			rest, _ := io.ReadAll(br)
			if r.Status != test.status || string(body) != test.body || string(rest) != test.rest || r.KeepAlive != test.keep {
				t.Errorf("got %d, body %q, rest %q, keep-alive %v", r.Status, body, rest, r.KeepAlive)
			}
		})
	}
}

func TestReadResponseFails(t *testing.T) {
	for name, in := range map[string]string{
		"nothing":              "",
		"cut":                  "HTTP/1.1 200",
		"cut header":           "HTTP/1.1 200 OK\r\nA: b\r\n",
		"not HTTP":             "SSH-2.0-OpenSSH\r\n\r\n",
		"HTTP/2":               "HTTP/2.0 200 OK\r\n\r\n",
		"status":               "HTTP/1.1 20 OK\r\n\r\n",
		"status 2":             "HTTP/1.1 -20 OK\r\n\r\n",
		"no colon":             "HTTP/1.1 200 OK\r\nfoo\r\n\r\n",
		"space before colon":   "HTTP/1.1 200 OK\r\nContent-Length : 3\r\n\r\n",
		"fold first":           "HTTP/1.1 200 OK\r\n a: b\r\n\r\n",
		"lengths":              "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
		"length":               "HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabcd",
		"encoding":             "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
		"encoding twice":       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
		"too long a line":      "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", maxHead) + "\r\n\r\n",
		"too many lines":       "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", maxHead/6) + "\r\n",
		"never a final answer": strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 100),
	} {
		if r, err := ReadResponse(reader(in), "GET"); err == nil {
			t.Errorf("%s: got %+v", name, r)
		} else if (name == "nothing") != (err == io.EOF) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What net/http's server side reads and writes is what this package writes and reads.
func TestAgainstNetHTTP(t *testing.T) {
	b, err := AppendRequest(nil, "POST", "/a?b=c", "host:80", Header{{"Upgrade", "x"}}, []byte("body"))
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(theirs.Body)
	if theirs.Method != "POST" || theirs.URL.String() != "/a?b=c" || theirs.Host != "host:80" || theirs.Header.Get("Upgrade") != "x" || string(body) != "body" {
		t.Errorf("net/http reads %+v with body %q", theirs, body)
	}
	ours, err := ReadRequest(bufio.NewReader(bytes.NewReader(b)))
	if err != nil {
		t.Fatal(err)
	}
	body, _ = io.ReadAll(ours.Body)
	want := Header{{"Host", "host:80"}, {"Upgrade", "x"}, {"Content-Length", "4"}}
	if ours.Method != "POST" || ours.Target != "/a?b=c" || !reflect.DeepEqual(ours.Header, want) || string(body) != "body" {
		t.Errorf("we read %+v with body %q", ours, body)
	}
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(AppendResponse(nil, 404, "Not Found", Header{{"A", "b"}}, []byte("xyz")))), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, _ = io.ReadAll(resp.Body)
	if resp.StatusCode != 404 || resp.Header.Get("A") != "b" || string(body) != "xyz" {
		t.Errorf("net/http reads %+v with body %q", resp, body)
	}
}

func TestAppendRequestFails(t *testing.T) {
	for name, f := range map[string]func() ([]byte, error){
		"target": func() ([]byte, error) { return AppendRequest(nil, "GET", "/a b", "h", nil, nil) },
		"host":   func() ([]byte, error) { return AppendRequest(nil, "GET", "/", "h\r\nA: b", nil, nil) },
		"method": func() ([]byte, error) { return AppendRequest(nil, "GE T", "/", "h", nil, nil) },
		"name":   func() ([]byte, error) { return AppendRequest(nil, "GET", "/", "h", Header{{"a b", ""}}, nil) },
		"value":  func() ([]byte, error) { return AppendRequest(nil, "GET", "/", "h", Header{{"a", "b\r\nc: d"}}, nil) },
	} {
		if b, err := f(); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nhel\r\n2 \r\nlo\r\n0\r\nT: t\r\n\r\nmore"))
	f.Add([]byte("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\nA: b\r\n c\r\n\r\nx"))
	f.Add([]byte("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := ReadResponse(bufio.NewReader(bytes.NewReader(b)), "GET"); err == nil {
			if n, _ := io.Copy(io.Discard, r.Body); n > int64(len(b)) {
				t.Errorf("%d bytes of body from %d bytes", n, len(b))
			}
		}
		if r, err := ReadRequest(bufio.NewReader(bytes.NewReader(b))); err == nil {
			io.Copy(io.Discard, r.Body)
			if _, err := AppendRequest(nil, r.Method, r.Target, "host", nil, nil); err != nil {
				t.Errorf("read and not written: %v", err)
			}
		}
	})
}
