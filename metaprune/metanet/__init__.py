"""The graph metanetwork: trained once on a zoo of networks, it prunes networks it has never seen."""
