package tailnode

// Changed starts the server if need be and returns a channel that is closed at the next change of its
// state, its health or its netmap. Take the channel before Status, so that no change is
// missed. Closing the server need not close it.
func (c *LocalClient) Changed() (<-chan struct{}, error) {
	n, err := c.s.start("watch")
	if err != nil {
		return nil, err
	}
	_, ch := n.Status()
	return ch, nil
}
