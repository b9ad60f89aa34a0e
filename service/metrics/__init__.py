"""Prometheus metrics: the service's own, and the names by which gateways know an LLM server."""

from service.metrics.batch_metrics import BatchMetrics
from service.metrics.service_metrics import ServiceMetrics
from service.metrics.vllm_metrics import LoraRequests

__all__ = ["BatchMetrics", "LoraRequests", "ServiceMetrics"]
