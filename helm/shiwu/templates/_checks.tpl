{{/* Seconds a pod may take to end. */}}
{{- define "shiwu.grace" -}}
{{- $grace := int .Values.worker.graceS -}}
{{- $after := add (mul 2 (get .Values.worker.settings "REDIS_TIMEOUT_S" | default 5 | float64 | ceil | int)) 8 | int -}}
{{- $least := add $grace $after | int -}}
{{- $end := default (add $least 5) .Values.worker.terminationGracePeriodSeconds | int -}}
{{- if lt $end $least -}}
{{- fail (printf "worker.terminationGracePeriodSeconds: expected at least %d (worker.graceS %d + %d to write the last answers, end the loaders and send the last traces), got %d: Kubernetes would kill workers that still drain" $least $grace $after $end) -}}
{{- end -}}
{{- $end -}}
{{- end -}}

{{/* Jobs that one busy pod holds. */}}
{{- define "shiwu.held" -}}
{{- $worker := .Values.worker -}}
{{- $each := int $worker.slots | default (add (mul 3 (int $worker.maxBatch | default (eq $worker.device "cpu" | ternary 64 256))) (mul (int $worker.loaders) (int (get $worker.settings "LOADER_THREADS") | default 8))) -}}
{{- mul $each (int (include "shiwu.processes" .)) -}}
{{- end -}}

{{/* Wrong values that a schema can't see, one readable line each. */}}
{{- define "shiwu.checks" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- if not $v.worker.image.repository -}}
{{- $wrong = append $wrong (printf "worker.image.repository: expected the worker's image as your cluster pulls it, such as registry.example/shiwu-worker%s, got none: no registry has images of shiwu, `make images` builds them (docs/images.md), and you push them" (eq $v.worker.device "cpu" | ternary "-cpu" "")) -}}
{{- end -}}
{{- if and (not $v.sweep.image.repository) (or $v.sweep.enabled $v.producer.enabled $v.hooks.enabled $v.watch.enabled $v.test.enabled) -}}
{{- $wrong = append $wrong "sweep.image.repository: expected the producer's image as your cluster pulls it, such as registry.example/shiwu-producer, got none: the sweep, the producer's CronJob and `helm test` run it" -}}
{{- end -}}
{{- if and $v.hooks.enabled (not (or $v.hooks.endpoints $v.hooks.urls)) -}}
{{- $wrong = append $wrong "hooks.endpoints: expected endpoints, or hooks.urls, got neither" -}}
{{- end -}}
{{- if and $v.hooks.enabled (not $v.hooks.existingSecret) -}}
{{- $wrong = append $wrong "hooks.existingSecret: expected a Secret with the files that secret_file names, got none" -}}
{{- end -}}
{{- if $v.watch.enabled -}}
{{- $port := include "shiwu.eventsPort" . -}}
{{- if eq (empty $v.watch.source) (empty $v.watch.sourceSecret) -}}
{{- $wrong = append $wrong (printf "watch.source: expected source or sourceSecret, got %s" (empty $v.watch.source | ternary "neither" "both")) -}}
{{- end -}}
{{- if not $v.watch.rules -}}
{{- $wrong = append $wrong "watch.rules: expected at least one rule, got none: every event would be left out" -}}
{{- end -}}
{{- if and $port (lt (int $port) 1024) -}}
{{- $wrong = append $wrong (printf "watch.source: expected a port from 1024, as in http://0.0.0.0:8080/events, got %s, on which a pod without privileges cannot listen" $port) -}}
{{- end -}}
{{- if and $port (not $v.watch.tokenSecret) (not (has "--no-token" $v.watch.args)) -}}
{{- $wrong = append $wrong "watch.tokenSecret: expected a Secret with the tokens that let requests in, or --no-token in watch.args, got neither" -}}
{{- end -}}
{{- end -}}
{{- if and $v.autoscaling.keda.enabled $v.autoscaling.hpa.enabled -}}
{{- $wrong = append $wrong "autoscaling: expected keda or hpa, got both enabled: two autoscalers would fight over one Deployment" -}}
{{- end -}}
{{- if and $v.monitoring.podMonitor.enabled $v.monitoring.serviceMonitor.enabled -}}
{{- $wrong = append $wrong "monitoring: expected podMonitor or serviceMonitor, got both enabled: every number would count twice" -}}
{{- end -}}
{{- if and $v.valkey.enabled (or $v.redis.host $v.redis.sentinel.enabled $v.redis.cluster.enabled $v.redis.urlKey $v.redis.tls.enabled) -}}
{{- $wrong = append $wrong "valkey.enabled: expected no redis.host, redis.urlKey, redis.tls, redis.sentinel and redis.cluster together with the trial server" -}}
{{- end -}}
{{- if not (or $v.valkey.enabled $v.redis.host $v.redis.sentinel.enabled $v.redis.cluster.enabled $v.redis.urlKey) -}}
{{- $wrong = append $wrong "redis: expected redis.host, redis.sentinel.enabled, redis.cluster.enabled, redis.urlKey, or valkey.enabled for a trial; got none" -}}
{{- end -}}
{{- if and $v.redis.sentinel.enabled (not $v.redis.sentinel.addresses) -}}
{{- $wrong = append $wrong "redis.sentinel.addresses: expected host:port of each sentinel, got none" -}}
{{- end -}}
{{- if and $v.redis.cluster.enabled (not $v.redis.cluster.addresses) -}}
{{- $wrong = append $wrong "redis.cluster.addresses: expected host:port of some nodes, got none" -}}
{{- end -}}
{{- if and $v.redis.cluster.enabled $v.redis.sentinel.enabled -}}
{{- $wrong = append $wrong "redis: expected redis.sentinel or redis.cluster, got both enabled" -}}
{{- end -}}
{{- if and $v.redis.cluster.enabled (ne (int $v.redis.database) 0) -}}
{{- $wrong = append $wrong (printf "redis.database: expected 0 on a cluster, which has no other, got %d" (int $v.redis.database)) -}}
{{- end -}}
{{- if and $v.redis.cluster.enabled $v.autoscaling.keda.enabled (eq $v.autoscaling.keda.trigger "redis") -}}
{{- $wrong = append $wrong "autoscaling.keda.trigger: expected metrics-api on a cluster, whose keys KEDA cannot add up over the shards" -}}
{{- end -}}
{{- if and $v.autoscaling.keda.enabled (eq $v.autoscaling.keda.trigger "metrics-api") (not $v.autoscaling.keda.metricsApi.url) -}}
{{- $wrong = append $wrong "autoscaling.keda.metricsApi.url: expected the URL that KEDA asks, got none" -}}
{{- end -}}
{{- if and $v.redis.sentinel.enabled $v.redis.tls.enabled -}}
{{- $wrong = append $wrong "redis.tls: expected no TLS together with sentinel, for a sentinel:// URL can't say it; put a TLS proxy or one address before them" -}}
{{- end -}}
{{- if and (or $v.redis.urlKey $v.redis.sentinel.passwordKey $v.redis.username $v.sweep.urlKey $v.hooks.urlKey $v.watch.urlKey $v.producer.urlKey $v.test.urlKey) (not $v.redis.existingSecret) (not $v.valkey.enabled) -}}
{{- $wrong = append $wrong "redis.existingSecret: expected a Secret for redis.username, redis.sentinel.passwordKey, and redis.urlKey or that of a part, got none" -}}
{{- end -}}
{{- if and $v.autoscaling.keda.enabled (eq $v.autoscaling.keda.trigger "redis") $v.redis.urlKey (not (or $v.redis.host $v.redis.sentinel.enabled)) -}}
{{- $wrong = append $wrong "autoscaling.keda: expected redis.host and redis.passwordKey together with redis.urlKey, because KEDA cannot read a URL" -}}
{{- end -}}
{{- if and $v.autoscaling.keda.enabled (lt (int $v.autoscaling.keda.jobsPerWorker) (int (include "shiwu.held" .))) -}}
{{- $wrong = append $wrong (printf "autoscaling.keda.jobsPerWorker: expected at least %s, which one busy worker holds by itself, got %d: workers would ask for more workers" (include "shiwu.held" .) (int $v.autoscaling.keda.jobsPerWorker)) -}}
{{- end -}}
{{- range $name, $scaler := dict "keda" $v.autoscaling.keda "hpa" $v.autoscaling.hpa -}}
{{- if gt (int $scaler.minReplicas) (int $scaler.maxReplicas) -}}
{{- $wrong = append $wrong (printf "autoscaling.%s.maxReplicas: expected at least minReplicas %d, got %d" $name (int $scaler.minReplicas) (int $scaler.maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.model.source "pvc") (not $v.model.pvc.existingClaim) -}}
{{- $wrong = append $wrong "model.pvc.existingClaim: expected a claim for model.source pvc, got none" -}}
{{- end -}}
{{- if and (eq $v.model.source "download") (not $v.model.download.id) -}}
{{- $wrong = append $wrong "model.download.id: expected a hub id for model.source download, got none" -}}
{{- end -}}
{{- if and (eq $v.model.source "image") (not $v.model.image.reference) -}}
{{- $wrong = append $wrong "model.image.reference: expected an image for model.source image, got none" -}}
{{- end -}}
{{- if and (eq $v.model.source "baked") (not $v.model.path) -}}
{{- $wrong = append $wrong "model.path: expected the folder below /models for model.source baked, got none" -}}
{{- end -}}
{{- if and $v.labels.sets $v.labels.existingConfigMap -}}
{{- $wrong = append $wrong "labels: expected sets or existingConfigMap, got both" -}}
{{- end -}}
{{- if and $v.producer.enabled (not (or $v.producer.references $v.producer.existingConfigMap)) -}}
{{- $wrong = append $wrong "producer.references: expected references or existingConfigMap for producer.enabled, got none" -}}
{{- end -}}
{{- if and $v.autoscaling.keda.enabled (eq (int $v.autoscaling.keda.minReplicas) 0) (not $v.sweep.enabled) -}}
{{- $wrong = append $wrong "sweep.enabled: expected true if autoscaling.keda.minReplicas is 0; otherwise nothing returns delayed jobs to a lane that KEDA counts" -}}
{{- end -}}
{{- if and (eq $v.model.source "download") $v.networkPolicy.enabled (not $v.networkPolicy.publicWeb) (not $v.networkPolicy.extraEgress) -}}
{{- $wrong = append $wrong "networkPolicy: expected publicWeb, or the hub's mirror in extraEgress, for model.source download" -}}
{{- end -}}
{{- $variables := list -}}
{{- range $v.worker.extraEnv -}}
{{- $variables = append $variables .name -}}
{{- end -}}
{{- range $name, $own := dict "REDIS_URL" "redis" "GRACE_S" "worker.graceS" "LOADERS" "worker.loaders" "SLOTS" "worker.slots" "MAX_BATCH" "worker.maxBatch" "TORCH_THREADS" "worker.torchThreads" "MODEL" "model" "LABELS_DIR" "labels" "DEFAULT_LABELS" "labels.default" "HTTP_PORT" "http.port" "HTTP_HOST" "http.host" "DEVICE" "worker.device" "S3_ENDPOINT_URL" "s3.endpointUrl" "S3_REGION" "s3.region" "S3_CLIENT" "s3.client" -}}
{{- if hasKey $v.worker.settings $name -}}
{{- $wrong = append $wrong (printf "worker.settings.%s: expected it as the value %s, from which more than the variable follows" $name $own) -}}
{{- end -}}
{{- if has (printf "SHIWU_%s" $name) $variables -}}
{{- $wrong = append $wrong (printf "worker.extraEnv: SHIWU_%s: expected it as the value %s, from which more than the variable follows" $name $own) -}}
{{- end -}}
{{- end -}}
{{- if and (hasKey $v.worker.settings "LEASE_S") (lt (float64 (get $v.worker.settings "LEASE_S")) 5.0) -}}
{{- $wrong = append $wrong "worker.settings.LEASE_S: expected at least 5 on a cluster, where a pod may stand still for seconds" -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n  %s" (join "\n  " $wrong)) -}}
{{- end -}}
{{- end -}}
