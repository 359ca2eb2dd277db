// A page that lives through the end of its server: node again.mjs NAME. Its title says which server its
// events came from, and which one answered a request made then.
import { createServer } from 'node:http'
import { WebSocketServer } from 'ws'

const name = process.argv[2]
const page = `<!doctype html><title>begun</title><script>
  const events = new EventSource('/events')
  events.onmessage = async ({ data }) => {
    const answer = await fetch('/name', { method: 'POST' })
    document.title = data + ' events, ' + (await answer.text()) + ' answer'
  }
  const socket = new WebSocket(location.origin.replace('https', 'wss'))
  socket.onmessage = ({ data }) => console.log(data + ' socket')
  socket.onclose = ({ code }) => console.log('socket closed ' + code)
</script>`

const server = createServer((request, response) => {
  if (request.url === '/events') {
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write(`retry: 100\ndata: ${name}\n\n`)
  } else if (request.url === '/name') {
    response.end(name)
  } else {
    response.setHeader('content-type', 'text/html')
    response.end(page)
  }
})
new WebSocketServer({ server }).on('connection', (socket) => socket.send(name))
server.listen(3000)
