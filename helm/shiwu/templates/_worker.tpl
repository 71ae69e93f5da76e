{{- define "shiwu.scaled" -}}
{{- if or .Values.autoscaling.keda.enabled .Values.autoscaling.hpa.enabled }}yes{{ end -}}
{{- end -}}

{{- define "shiwu.modelPath" -}}
{{- $model := .Values.model -}}
{{- if eq $model.source "download" -}}
/models/{{ $model.download.id | replace "/" "--" }}
{{- else if ne $model.source "embedded" -}}
{{- list "/models" $model.path | join "/" | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{/* Worker processes of one pod, each with an HTTP port: a launcher starts one for each GPU. */}}
{{- define "shiwu.processes" -}}
{{- eq .Values.worker.device "gpu" | ternary (int .Values.worker.gpu.count) 1 -}}
{{- end -}}

{{/* Names of their ports, as a list in JSON: http, http-1, … */}}
{{- define "shiwu.httpPorts" -}}
{{- $names := list "http" -}}
{{- range untilStep 1 (int (include "shiwu.processes" .)) 1 -}}
{{- $names = append $names (printf "http-%d" .) -}}
{{- end -}}
{{- toJson $names -}}
{{- end -}}

{{/*
A probe of the pod. The port of one of several workers has no state of the others, and is closed while a broken GPU is
out of use. The launcher's files exist while all workers are ready, and are touched while the slowest one makes progress.
A file that an earlier container of the pod left does not count, because the new one would be killed during its start. So
no file may be older than process 1, whose start is field 22 of /proc/1/stat, in hundredths of a second since the boot.
*/}}
{{- define "shiwu.probe" -}}
{{- $settings := .root.Values.worker.settings -}}
{{- if eq (include "shiwu.processes" .root) "1" -}}
httpGet: {path: {{ eq .kind "ready" | ternary "/readyz" "/livez" }}, port: http}
{{- else if eq .kind "ready" -}}
exec: {command: [test, -e, {{ get $settings "READY_FILE" | default "/tmp/shiwu-ready" | quote }}]}
{{- else -}}
{{- $age := "set -- $(cat /proc/1/stat); read up _ < /proc/uptime; age=$((${up%.*} - ${22} / 100)); [ $age -lt 60 ] || age=60" }}
exec: {command: [sh, -c, {{ printf "%s; test -n \"$(find '%s' -newermt \"-$age seconds\")\"" $age (get $settings "ALIVE_FILE" | default "/tmp/shiwu-alive") | toJson }}]}
{{- end -}}
{{- end -}}

{{- define "shiwu.workerEnv" -}}
{{- $v := .Values -}}
{{- include "shiwu.redisEnv" (dict "root" . "role" "worker" "username" "" "passwordKey" "" "urlKey" "") }}
- {name: SHIWU_HTTP_PORT, value: {{ $v.http.port | quote }}}
{{- if ne $v.http.host "0.0.0.0" }}
- {name: SHIWU_HTTP_HOST, value: {{ $v.http.host | quote }}}
{{- end }}
{{- if ne (include "shiwu.processes" .) "1" }}
{{- range $name, $path := dict "READY_FILE" "/tmp/shiwu-ready" "ALIVE_FILE" "/tmp/shiwu-alive" }}
{{- if not (hasKey $v.worker.settings $name) }}
- {name: SHIWU_{{ $name }}, value: {{ $path }}}
{{- end }}
{{- end }}
{{- end }}
- name: SHIWU_WORKER_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- {name: SHIWU_DEVICE, value: {{ eq $v.worker.device "gpu" | ternary "cuda" "cpu" }}}
- {name: SHIWU_GRACE_S, value: {{ $v.worker.graceS | quote }}}
- {name: SHIWU_LOADERS, value: {{ $v.worker.loaders | quote }}}
{{- range $name, $value := dict "TORCH_THREADS" $v.worker.torchThreads "MAX_BATCH" $v.worker.maxBatch "SLOTS" $v.worker.slots }}
{{- if int $value }}
- {name: SHIWU_{{ $name }}, value: {{ int $value | quote }}}
{{- end }}
{{- end }}
{{- with include "shiwu.modelPath" . }}
- {name: SHIWU_MODEL, value: {{ . | quote }}}
{{- end }}
{{- if or $v.labels.sets $v.labels.existingConfigMap }}
- {name: SHIWU_LABELS_DIR, value: /etc/shiwu/labels}
{{- end }}
- {name: SHIWU_DEFAULT_LABELS, value: {{ $v.labels.default | quote }}}
{{- with $v.s3.endpointUrl }}
- {name: SHIWU_S3_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- with $v.s3.region }}
- {name: SHIWU_S3_REGION, value: {{ . | quote }}}
{{- end }}
- {name: SHIWU_S3_CLIENT, value: {{ $v.s3.client | quote }}}
{{- if $v.s3.existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ $v.s3.existingSecret }}, key: {{ $v.s3.accessKeyIdKey }}}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ $v.s3.existingSecret }}, key: {{ $v.s3.secretAccessKeyKey }}}}
{{- end }}
- {name: AWS_EC2_METADATA_DISABLED, value: "true"}
- {name: HF_HUB_OFFLINE, value: "1"}
- {name: HOME, value: /tmp}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /tmp/compiled/inductor}
- {name: TRITON_CACHE_DIR, value: /tmp/compiled/triton}
{{- $folders := compact (list (get $v.worker.settings "ALLOW_FOLDERS") ($v.test.enabled | ternary "/etc/shiwu/test" "")) }}
{{- if $folders }}
- {name: SHIWU_ALLOW_FOLDERS, value: {{ join "," $folders | quote }}}
{{- end }}
{{- range $name, $value := omit $v.worker.settings "ALLOW_FOLDERS" }}
{{- /* Numbers from files are floats: 50000000 must not become 5e+07. */}}
{{- if kindIs "float64" $value }}
{{- $value = eq $value (floor $value) | ternary (int64 $value) $value }}
{{- end }}
- {name: SHIWU_{{ $name }}, value: {{ toString $value | quote }}}
{{- end }}
{{- with $v.worker.extraEnv }}
{{ tpl (toYaml .) $ }}
{{- end }}
{{- end -}}

{{- define "shiwu.workerMounts" -}}
{{- $v := .Values -}}
- {name: tmp, mountPath: /tmp}
{{- if $v.worker.compileCache.existingClaim }}
- {name: compiled, mountPath: /tmp/compiled}
{{- end }}
- {name: shm, mountPath: /dev/shm}
{{- if not (has $v.model.source (list "embedded" "baked")) }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- if or $v.labels.sets $v.labels.existingConfigMap }}
- {name: labels, mountPath: /etc/shiwu/labels, readOnly: true}
{{- end }}
{{- if $v.test.enabled }}
- {name: test, mountPath: /etc/shiwu/test, readOnly: true}
{{- end }}
{{- include "shiwu.redisMount" . }}
{{- with $v.worker.extraVolumeMounts }}
{{ tpl (toYaml .) $ }}
{{- end }}
{{- end -}}

{{- define "shiwu.workerVolumes" -}}
{{- $v := .Values -}}
- name: tmp
  emptyDir: {sizeLimit: {{ $v.worker.tmpSize }}}
{{- with $v.worker.compileCache.existingClaim }}
- name: compiled
  persistentVolumeClaim: {claimName: {{ . }}}
{{- end }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ $v.worker.shmSize }}}
{{- if eq $v.model.source "pvc" }}
- name: model
  persistentVolumeClaim: {claimName: {{ $v.model.pvc.existingClaim }}, readOnly: true}
{{- else if eq $v.model.source "image" }}
- name: model
  image: {reference: {{ $v.model.image.reference | quote }}, pullPolicy: {{ $v.model.image.pullPolicy }}}
{{- else if and (eq $v.model.source "download") $v.model.download.existingClaim }}
- name: model
  persistentVolumeClaim: {claimName: {{ $v.model.download.existingClaim }}}
{{- else if eq $v.model.source "download" }}
- name: model
  emptyDir: {sizeLimit: {{ $v.model.download.size }}}
{{- end }}
{{- if or $v.labels.sets $v.labels.existingConfigMap }}
- name: labels
  configMap: {name: {{ default (printf "%s-labels" (include "shiwu.fullname" .)) $v.labels.existingConfigMap }}}
{{- end }}
{{- if $v.test.enabled }}
- name: test
  configMap: {name: {{ include "shiwu.fullname" . }}-test}
{{- end }}
{{- include "shiwu.redisVolume" . }}
{{- with $v.worker.extraVolumes }}
{{ tpl (toYaml .) $ }}
{{- end }}
{{- end -}}

{{/* Downloads the model once and checks it as the worker does; what is complete already is left alone. */}}
{{- define "shiwu.download" -}}
{{- $download := .Values.model.download -}}
- name: download-model
  image: {{ include "shiwu.image" (dict "root" . "image" .Values.worker.image) }}
  imagePullPolicy: {{ .Values.worker.image.pullPolicy }}
  securityContext: {{- toYaml .Values.securityContext | nindent 4 }}
  command: [tini, --, shiwu-worker, --fetch-model, {{ include "shiwu.modelPath" . | quote }}]
  env:
    - {name: SHIWU_MODEL, value: {{ printf "%s@%s" $download.id $download.revision | quote }}}
    - {name: HOME, value: /tmp}
    # The image sets offline mode; the cache of the hub's library does not belong into the claim.
    - {name: HF_HUB_OFFLINE, value: "0"}
    - {name: HF_HOME, value: /tmp/hub}
    {{- with $download.endpoint }}
    - {name: HF_ENDPOINT, value: {{ . | quote }}}
    {{- end }}
    {{- with $download.tokenSecret }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $download.tokenKey }}}}
    {{- end }}
  resources:
    requests: {cpu: 100m, memory: 512Mi}
    limits: {memory: 2Gi}
  volumeMounts:
    - {name: model, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
{{- end -}}
