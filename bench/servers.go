package main

import "errors"

func measureRelay(r *round) error { return errors.New("soon") }
func measureCoord(r *round) error { return errors.New("soon") }
func measureFaces(r *round) error { return errors.New("soon") }
