{{- define "interceptor.selector" -}}
app.kubernetes.io/name: interceptor
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "interceptor.labels" -}}
{{ include "interceptor.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "interceptor.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* What the daemon's file says. */ -}}
{{- define "interceptor.config" -}}
{{ toToml .Values.daemon }}
{{- end }}

{{- /* A container that touches nothing but the node's CNI directories. */ -}}
{{- define "interceptor.cniSecurity" -}}
securityContext:
  runAsUser: 0
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: cni-conf
    mountPath: {{ .Values.cni.confDir }}
  - name: cni-bin
    mountPath: {{ .Values.cni.binDir }}
{{- end }}
