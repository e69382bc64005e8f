package relay

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/tailnode/tailnode/internal/key"
)

const (
	keyFile  = "derp.key"
	certFile = "derp-cert.pem"
)

func (s *Server) privateKey() (key.NodePrivate, error) {
	if s.PrivateKey != [32]byte{} {
		return key.PrivateFromRaw[key.Node](s.PrivateKey), nil
	}
	if s.Dir == "" {
		return key.NewNode(), nil
	}
	path := filepath.Join(s.Dir, keyFile)
	text, err := os.ReadFile(path)
	if err == nil {
		var k key.NodePrivate
		if err := k.UnmarshalText(text); err != nil {
			return k, fmt.Errorf("relay: %s does not hold a key", path) // and err might quote it
		}
		return k, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return key.NodePrivate{}, fmt.Errorf("relay: %w", err)
	}
	k := key.NewNode()
	text, _ = k.MarshalText()
	return k, writeFile(s.Dir, keyFile, text)
}

// writeFile writes a secret file so that a crash leaves either all of it or none.
func writeFile(dir, name string, data []byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	f, err := os.CreateTemp(dir, name+".*") // 0600
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("relay: %w", err)
	}
	return nil
}

// tlsConfig returns the configuration to serve with, nil for plain HTTP, and the pin for the
// DERP map if the certificate is our own.
func (s *Server) tlsConfig(name, host string) (conf *tls.Config, pin string, err error) {
	switch {
	case s.PlainHTTP:
		return nil, "", nil
	case s.TLS != nil:
		return s.TLS.Clone(), "", nil
	case s.CertFile != "" || s.KeyFile != "":
		cert, err := tls.LoadX509KeyPair(s.CertFile, s.KeyFile)
		if err != nil {
			return nil, "", fmt.Errorf("relay: certificate: %w", err)
		}
		conf = &tls.Config{Certificates: []tls.Certificate{cert}}
	default:
		cert, err := s.selfSigned(name, host)
		if err != nil {
			return nil, "", err
		}
		sum := sha256.Sum256(cert.Certificate[0])
		pin = "sha256-raw:" + hex.EncodeToString(sum[:])
		conf = &tls.Config{Certificates: []tls.Certificate{cert}}
	}
	conf.MinVersion = tls.VersionTLS12
	return conf, pin, nil
}

// selfSigned returns the certificate kept in Dir, or a new one for the name if there is none
// or it is for another name or about to expire.
func (s *Server) selfSigned(name, host string) (tls.Certificate, error) {
	if s.Dir != "" {
		path := filepath.Join(s.Dir, certFile)
		text, err := os.ReadFile(path)
		switch {
		case err == nil:
			cert, err := tls.X509KeyPair(text, text)
			if err != nil {
				return cert, fmt.Errorf("relay: %s: %w", path, err)
			}
			if cert.Leaf.VerifyHostname(name) == nil && time.Until(cert.Leaf.NotAfter) > 30*24*time.Hour {
				return cert, nil
			}
		case !errors.Is(err, fs.ErrNotExist):
			return tls.Certificate{}, fmt.Errorf("relay: %w", err)
		}
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("relay: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("relay: %w", err)
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-48 * time.Hour), // clocks differ
		NotAfter:              now.AddDate(10, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	for _, n := range []string{name, host} {
		if ip := net.ParseIP(n); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else if n != "" {
			tmpl.DNSNames = append(tmpl.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &priv.PublicKey, priv)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("relay: certificate for %q: %w", name, err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("relay: %w", err)
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	if s.Dir != "" {
		if err := writeFile(s.Dir, certFile, text); err != nil {
			return tls.Certificate{}, err
		}
	}
	return tls.X509KeyPair(text, text)
}
