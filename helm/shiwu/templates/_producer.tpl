{{/* Workers that run at all times: what the alert ShiwuNoWorkers expects. */}}
{{- define "shiwu.expectedWorkers" -}}
{{- if .Values.autoscaling.keda.enabled -}}
{{- .Values.autoscaling.keda.minReplicas -}}
{{- else if .Values.autoscaling.hpa.enabled -}}
{{- .Values.autoscaling.hpa.minReplicas -}}
{{- else -}}
{{- .Values.worker.replicas -}}
{{- end -}}
{{- end -}}

{{/* The port of an http:// source of bucket events; empty for other sources. */}}
{{- define "shiwu.eventsPort" -}}
{{- if hasPrefix "http://" (lower .Values.watch.source) -}}
{{- regexFind ":[0-9]+$" (urlParse .Values.watch.source).host | trimPrefix ":" | default "80" -}}
{{- end -}}
{{- end -}}

{{/* A pod of the command `shiwu`, or of .program; role and access say as which Redis user: (dict … "role" "sweep" "access" .Values.sweep). */}}
{{- define "shiwu.producerPod" -}}
{{- $root := .root -}}
{{- $v := $root.Values -}}
serviceAccountName: {{ include "shiwu.serviceAccount" $root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- toYaml $v.podSecurityContext | nindent 2 }}
{{- with $v.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: {{ .name }}
    image: {{ include "shiwu.image" (dict "root" $root "image" $v.sweep.image) }}
    imagePullPolicy: {{ $v.sweep.image.pullPolicy }}
    securityContext: {{- toYaml $v.securityContext | nindent 6 }}
    command: [tini, --, {{ .program | default "shiwu" }}]
    args: {{- toYaml .args | nindent 6 }}
    {{- if or .port .eventsPort }}
    ports:
      {{- with .port }}
      - {name: http, containerPort: {{ . }}, protocol: TCP}
      {{- end }}
      {{- with .eventsPort }}
      - {name: events, containerPort: {{ . }}, protocol: TCP}
      {{- end }}
    {{- end }}
    {{- if .eventsPort }}
    # It listens once rules and Redis are checked.
    readinessProbe: {tcpSocket: {port: events}, periodSeconds: 5}
    {{- end }}
    env:
      {{- include "shiwu.redisEnv" (dict "root" $root "role" .role "username" .access.username "passwordKey" .access.passwordKey "urlKey" .access.urlKey) | trim | nindent 6 }}
      - {name: HOME, value: /tmp}
      {{- with .watch }}
      - name: SHIWU_WATCH_SOURCE
        {{- if .sourceSecret }}
        valueFrom: {secretKeyRef: {name: {{ .sourceSecret }}, key: {{ .sourceKey }}}}
        {{- else }}
        value: {{ .source | quote }}
        {{- end }}
      {{- end }}
      {{- with .extraEnv }}
      {{- tpl (toYaml .) $root | nindent 6 }}
      {{- end }}
    resources: {{- toYaml .resources | nindent 6 }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- with .references }}
      - {name: references, mountPath: /etc/shiwu/references, readOnly: true}
      {{- end }}
      {{- if .hooks }}
      - {name: endpoints, mountPath: /etc/shiwu/hooks, readOnly: true}
      {{- end }}
      {{- if .watch }}
      - {name: rules, mountPath: /etc/shiwu/watch, readOnly: true}
      {{- end }}
      {{- include "shiwu.redisMount" $root | nindent 6 }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 64Mi}
  {{- with .references }}
  - name: references
    configMap: {name: {{ . }}}
  {{- end }}
  {{- with .hooks }}
  # The secrets lie beside the file that names them.
  - name: endpoints
    projected:
      sources:
        - configMap: {name: {{ include "shiwu.fullname" $root }}-hooks}
        - secret: {name: {{ .existingSecret }}}
  {{- end }}
  {{- with .watch }}
  - name: rules
    projected:
      sources:
        - configMap: {name: {{ include "shiwu.fullname" $root }}-watch}
        {{- with .tokenSecret }}
        - secret: {name: {{ . }}, items: [{key: {{ $v.watch.tokenKey }}, path: tokens}]}
        {{- end }}
  {{- end }}
  {{- include "shiwu.redisVolume" $root | nindent 2 }}
{{- end -}}
