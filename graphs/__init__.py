"""Computation graphs: tracing, coupling, surgery, certificates, cost. The only package that knows operators."""
