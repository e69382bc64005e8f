package node

import (
	"path/filepath"
	"strings"
)

// ProgramName returns the name for a node of the program exe, a path or its last element.
func ProgramName(exe string) string {
	return strings.TrimSuffix(strings.ToLower(filepath.Base(exe)), ".exe")
}
