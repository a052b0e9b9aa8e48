"""Other systems on the same work, each in a module of its own behind `base.Peer`."""
